-- Orders a worker to take no new work, or to take it again. The order outlives the worker's process and everything else.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 worker id  3 ms until its running work must have moved, or '' to undo the order
-- Returns 1, or 0 when there is no such worker.
--@include workers

pass_when_full()
local now = time_ms(ARGV[1])
local worker = worker_hash(ARGV[2])
if not worker then return 0 end
if ARGV[3] == '' then
  if redis.call('HDEL', key('drains'), ARGV[2]) == 1 then fleet(now, 'worker_undrained', ARGV[2], '') end
else
  redis.call('HSET', key('drains'), ARGV[2], integer(now + tonumber(ARGV[3])))
  fleet(now, 'worker_draining', ARGV[2], 'takes no new work')
end
bump(worker.model)
hint('queue')
return 1
