-- A leaving replica's tasks become anybody's.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 replica  3 limit  4 end its lease too (1|0)
-- Returns how many tasks were handed over; call again while it is the limit.
--@include tasks

pass_when_full()
local now = time_ms(ARGV[1])
local owned = key('owned', ARGV[2])
local moved = redis.call('SPOP', owned, ARGV[3])
for _, task_id in ipairs(moved) do
  if redis.call('HGET', key('task', task_id), 'state') == 'running' then
    redis.call('SADD', key('orphans'), task_id)
    redis.call('HSET', key('task', task_id), 'owner', '')
  end
end
if ARGV[4] == '1' and #moved < tonumber(ARGV[3]) then
  lose_readers(ARGV[2], now)
  redis.call('ZREM', key('replicas'), ARGV[2])
  if redis.call('HDEL', key('replica-urls'), ARGV[2]) == 1 then fleet(now, 'replica_left', ARGV[2], 'stopped') end
  redis.call('HDEL', key('replica-leases'), ARGV[2])
end
if #moved > 0 then hint('fleet') end
return #moved
