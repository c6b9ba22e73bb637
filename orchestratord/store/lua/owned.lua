-- Attempts in flight that a replica owns, or that run at a worker.
-- KEYS   1 anchor
-- ARGV   1 owned|running  2 replica id or worker id
-- Returns a list of running task fields.

local members = ARGV[1] == 'owned' and redis.call('SMEMBERS', key('owned', ARGV[2]))
  or redis.call('HKEYS', key('running', ARGV[2]))
local result = {}
for i, task_id in ipairs(members) do
  result[i] = redis.call('HMGET', key('task', task_id), unpack(RUNNING_FIELDS))
end
return result
