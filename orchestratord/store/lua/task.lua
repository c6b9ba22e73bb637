-- Reads tasks.
-- KEYS   1 anchor
-- ARGV   1 tenant or ''  2… task ids
-- Returns for each task, in order, { task fields (RECORD_FIELDS), position }, or nil when the tenant has no such task.
--@include tasks

local result = {}
for i = 2, #ARGV do
  local task = task_hash(ARGV[i])
  if task and (ARGV[1] == '' or task.tenant == ARGV[1]) then
    result[i - 1] = { pick(task, RECORD_FIELDS), position(task) }
  else
    result[i - 1] = false
  end
end
return result
