-- Forgets a task that has ended, with its log and its idempotency record.
-- KEYS   1 anchor
-- ARGV   1 task id
-- Returns 1, or 0 when there is no such task or it hasn't ended.
--@include tasks

local task = task_hash(ARGV[1])
if not task or is_live(task) then return 0 end
redis.call('DEL', key('task', ARGV[1]), key('payload', ARGV[1]), key('log', ARGV[1]))
if task.idempotency_key then
  local idem = key('idem', task.tenant, task.idempotency_key)
  if redis.call('GET', idem) == ARGV[1] then redis.call('DEL', idem) end
end
unindex(task, task.state)
redis.call('ZREM', key('done'), ARGV[1])
redis.call('ZREM', key('webhooks'), ARGV[1])
return 1
