-- A worker was probed and found dead.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 worker id  3 instance id that was probed  4 reason
--        5 '1': nothing answers at its address, so that heartbeats alone don't bring it back (see worker_answers)
-- Returns 1 when this call marked it; 0 when another instance is registered or it was lost already.
--@include workers

pass_when_full()
local worker = worker_hash(ARGV[2])
if not worker or worker.instance_id ~= ARGV[3] or worker.lost == '1' then return 0 end
lose(worker, time_ms(ARGV[1]), ARGV[4])
if ARGV[5] == '1' then redis.call('HSET', key('worker', ARGV[2]), 'unreachable', '1') end
return 1
