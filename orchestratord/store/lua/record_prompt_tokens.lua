-- Notes how many tokens the worker counted in the prompt.
-- KEYS   1 anchor
-- ARGV   1 task id  2 attempt  3 tokens
-- Returns 1, or 0 when the attempt is not the running one.

pass_when_full()
local name = key('task', ARGV[1])
local task = redis.call('HMGET', name, 'state', 'attempt')
if task[1] ~= 'running' or task[2] ~= ARGV[2] then return 0 end
redis.call('HSET', name, 'tokens_in', ARGV[3])
return 1
