-- A worker that was unreachable answers at its address again.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 worker id  3 instance id that answered
-- Returns 1 when it takes work again by that; 0 when it was not unreachable, is another one, or doesn't heartbeat.
--@include workers

pass_when_full()
local now = time_ms(ARGV[1])
local worker = worker_hash(ARGV[2])
if not worker or worker.instance_id ~= ARGV[3] or worker.unreachable ~= '1' then return 0 end
redis.call('HDEL', key('worker', ARGV[2]), 'unreachable')
if tonumber(worker.lease_expires_at_ms) <= now then return 0 end  -- its next heartbeat brings it back
redis.call('HSET', key('worker', ARGV[2]), 'lost', '0')
redis.call('ZADD', key('worker-leases'), worker.lease_expires_at_ms, ARGV[2])
fleet(now, 'worker_back', ARGV[2], 'answers again')
bump(worker.model)
hint('queue')
return 1
