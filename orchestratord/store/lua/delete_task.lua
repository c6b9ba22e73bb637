-- Forgets tasks that have ended, with their logs and their idempotency records.
-- KEYS   1 anchor
-- ARGV   1… task ids
-- Returns how many: one that doesn't exist, hasn't ended, or whose webhook isn't delivered yet, is passed over.
--@include tasks

local deleted = 0
for _, task_id in ipairs(ARGV) do
  local task = task_hash(task_id)
  if task and not is_live(task) and not redis.call('ZSCORE', key('webhooks'), task_id) then
    redis.call('DEL', key('task', task_id), key('payload', task_id), key('log', task_id))
    for _, name in ipairs(keys_of(task)) do
      local idem = key('idem', task.tenant, name)
      if redis.call('GET', idem) == task_id then redis.call('DEL', idem) end
    end
    unindex(task, task.state)
    redis.call('ZREM', key('done'), task_id)
    deleted = deleted + 1
  end
end
return deleted
