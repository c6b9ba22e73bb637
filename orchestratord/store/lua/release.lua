-- The worker says that a stopped attempt holds its slot no more.
-- KEYS   1 anchor
-- ARGV   1 worker id  2 task id  3 attempt
-- Returns 1 when the slot was still taken, else 0.

pass_when_full()
local freed = redis.call('HDEL', key('stopping', ARGV[1]), ARGV[2] .. ':' .. ARGV[3])
if freed == 1 then
  local model = redis.call('HGET', key('worker', ARGV[1]), 'model')
  if model then bump(model) end
  hint('queue')
end
return freed
