-- Appends batches of tokens to their tasks' logs, each fenced by its attempt.
-- KEYS   1 anchor
-- ARGV   5 for each batch: task id, attempt, first index, last index, tokens. A batch that overlaps the log's end is
--        stored whole; readers strip what they have.
-- Returns one number for each batch: -1 appended, -2 covered (the log had all of them), -3 stale (another attempt, or
--        ended), n ≥ 0: a gap, the log's next index is n and nothing was written
-- Event  <attempt>-<last index + 1> tokens

pass_when_full()
local outcomes = {}
for i = 1, #ARGV, 5 do
  local task_id, attempt, first, last = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local name = key('task', task_id)
  local task = redis.call('HMGET', name, 'state', 'attempt', 'tokens_logged')
  local logged = tonumber(task[3] or 0)
  local outcome = -1
  if task[1] ~= 'running' or task[2] ~= attempt then
    outcome = -3
  elseif last < logged then
    outcome = -2
  elseif first > logged then
    outcome = logged
  else
    local length = integer(last + 1)
    redis.call('XADD', key('log', task_id), attempt .. '-' .. length, 'tokens', ARGV[i + 4])
    redis.call('HSET', name, 'tokens_logged', length)
    hint('log:' .. task_id)
  end
  outcomes[#outcomes + 1] = outcome
end
return outcomes
