-- Webhooks whose time has come.
-- KEYS   1 anchor
-- ARGV   1 now_ms or '', 2 limit
-- Returns flat list of task id, tries so far

local result = {}
local due = redis.call('ZRANGEBYSCORE', key('webhooks'), '-inf', integer(time_ms(ARGV[1])), 'LIMIT', 0, ARGV[2])
for _, task_id in ipairs(due) do
  result[#result + 1] = task_id
  result[#result + 1] = redis.call('HGET', key('task', task_id), 'webhook_tries') or '0'
end
return result
