-- How many tasks wait, and since when.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''
-- Returns { now_ms, list of { model, queue's tail, depth, created_at_ms of its first task } }

local now = time_ms(ARGV[1])
local result = {}
for _, model in ipairs(redis.call('HKEYS', key('waiting'))) do
  for _, tail in ipairs(redis.call('SMEMBERS', key('queues', model))) do
    local queue = key('queue', model) .. ':' .. tail
    local first = redis.call('ZRANGE', queue, 0, 0)[1]
    if first then
      result[#result + 1] = { model, tail, redis.call('ZCARD', queue),
        redis.call('HGET', key('task', first), 'created_at_ms') }
    end
  end
end
return { integer(now), result }
