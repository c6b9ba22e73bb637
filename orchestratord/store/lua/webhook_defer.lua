-- A delivery failed: count it and come back later.
-- KEYS   1 anchor
-- ARGV   1 now_ms or '', 2 task id, 3 tries with this one, 4 delay in ms
-- Returns 1, or 0 when it is not waiting for this try (any more)

local task = key('task', ARGV[2])
if not redis.call('ZSCORE', key('webhooks'), ARGV[2]) then return 0 end
if tonumber(redis.call('HGET', task, 'webhook_tries') or '0') ~= tonumber(ARGV[3]) - 1 then return 0 end
redis.call('HSET', task, 'webhook_tries', ARGV[3])
redis.call('ZADD', key('webhooks'), 'XX', integer(time_ms(ARGV[1]) + tonumber(ARGV[4])), ARGV[2])
return 1
