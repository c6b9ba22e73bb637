-- Checks that keys which belong to one task still have it: its log, its payload, its idempotency record.
-- KEYS   1 anchor
-- ARGV   1 repair (1|0)  2… kind, key, task id or '' where the key's value names it
-- Returns invariant, key, detail, repaired 1|0, … of each finding. Repair deletes the key.

local findings = {}
for i = 2, #ARGV, 3 do
  local kind, name, task_id = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if kind == 'idem' then task_id = redis.call('GET', name) or '' end
  if redis.call('EXISTS', name) == 1 and redis.call('EXISTS', key('task', task_id)) == 0 then
    if ARGV[1] == '1' then redis.call('DEL', name) end
    for _, part in ipairs({ 'orphaned-key', name, 'its task is gone', ARGV[1] == '1' and 1 or 0 }) do
      findings[#findings + 1] = part
    end
  end
end
return findings
