-- Checks that each task is where its state says, and nowhere else, and that its log ends as it should.
-- KEYS   1 anchor
-- ARGV   1 repair (1|0)  2… task ids
-- Returns invariant, key, detail, repaired 1|0, … of each finding. A task that doesn't exist (any more) has none.
-- Repair makes places and indexes say what the task's hash says. Logs are left alone: clients have read them.
--@include tasks

local repair = ARGV[1] == '1'
local findings = {}
local function found(invariant, name, detail, mend)
  if repair and mend then mend() end
  for _, part in ipairs({ invariant, name, detail, (repair and mend) and 1 or 0 }) do findings[#findings + 1] = part end
end

-- One place: is the task's presence there what it should be?
local function place(task, name, present, wanted, detail, add, remove)
  if present == wanted then return end
  if wanted then
    found('task-in-one-place', name, 'task ' .. task.task_id .. ' (' .. task.state .. ') is missing: ' .. detail, add)
  else
    found('task-in-one-place', name, 'task ' .. task.task_id .. ' (' .. task.state .. ') should not be there: ' .. detail,
      remove)
  end
end

local function zset_place(task, name, wanted, score, detail)
  local at = redis.call('ZSCORE', name, task.task_id)
  local present = at and true or false
  if present and wanted and score and tonumber(at) ~= tonumber(score) then
    found('order', name, 'task ' .. task.task_id .. ' stands at ' .. at .. ' instead of ' .. score, function()
      redis.call('ZADD', name, score, task.task_id)
    end)
    return
  end
  place(task, name, present, wanted, detail, function() redis.call('ZADD', name, score, task.task_id) end,
    function() redis.call('ZREM', name, task.task_id) end)
end

local function check_waiting(task)
  local queued = task.state == 'queued'
  local tail = queue_of(task)
  local queue = key('queue', task.model) .. ':' .. tail
  zset_place(task, queue, queued, task.sequence, 'its queue')
  zset_place(task, key('waiting-in', task.model, task.priority), queued, task.sequence, 'the order of its model')
  zset_place(task, key('retry'), task.state == 'retry', task.retry_at_ms or task.created_at_ms, 'the backoff')
  if queued and redis.call('SISMEMBER', key('queues', task.model), tail) == 0 then
    found('registry', key('queues', task.model), 'queue ' .. tail .. ' is missing', function()
      redis.call('SADD', key('queues', task.model), tail)
    end)
  end
  if queued and tonumber(redis.call('HGET', key('waiting'), task.model) or '0') ~= waiting_in(task.model) then
    found('depth', key('waiting'), 'of ' .. task.model .. ' is not ' .. waiting_in(task.model), function()
      count_waiting(task.model)
    end)
  end
  if is_live(task) and redis.call('SISMEMBER', key('active', task.model), task.tenant) == 0 then
    found('registry', key('active', task.model), 'tenant ' .. task.tenant .. ' is missing', function()
      redis.call('SADD', key('active', task.model), task.tenant)
    end)
  end
end

local function set_place(task, name, wanted, detail)
  place(task, name, redis.call('SISMEMBER', name, task.task_id) == 1, wanted, detail,
    function() redis.call('SADD', name, task.task_id) end, function() redis.call('SREM', name, task.task_id) end)
end

local function check_running(task)
  local running = task.state == 'running'
  if task.worker_id ~= '' then
    local name = key('running', task.worker_id)
    local attempt = redis.call('HGET', name, task.task_id)
    place(task, name, attempt == task.attempt, running, 'its slot',
      function() redis.call('HSET', name, task.task_id, task.attempt) end,
      function() redis.call('HDEL', name, task.task_id) end)
  end
  if task.owner ~= '' then
    set_place(task, key('owned', task.owner), running, 'its owner')
    if running and not redis.call('ZSCORE', key('replicas'), task.owner) then
      found('owner', key('replicas'), task.owner .. ' owns ' .. task.task_id .. ' and can never be found dead', function()
        redis.call('ZADD', key('replicas'), 0, task.owner)
      end)
    end
  end
  set_place(task, key('orphans'), running and task.owner == '', 'tasks handed over')
end

local function check_ended(task)
  local ended = not is_live(task)
  zset_place(task, key('done'), ended, task.finished_at_ms, 'finished tasks')
  zset_place(task, key('deadlines'), not ended and task.deadline_at_ms ~= nil, task.deadline_at_ms, 'deadlines')
  local payload = key('payload', task.task_id)
  if (redis.call('EXISTS', payload) == 1) == ended then
    found('payload', payload, 'task ' .. task.task_id .. ' (' .. task.state .. ')', ended and function()
      redis.call('DEL', payload)
    end)
  end
end

local function check_indexes(task)
  for _, status in ipairs({ 'queued', 'running', 'completed', 'failed', 'cancelled' }) do
    local wanted = status == status_of(task.state)
    zset_place(task, key('tasks-by', task.tenant, status), wanted, task.sequence, 'listing')
    zset_place(task, key('tasks-by', task.tenant, status, task.model), wanted, task.sequence, 'listing')
  end
end

local function last_position(task)
  if not is_live(task) then return task.attempt .. '-' .. TERMINAL end
  if task.attempt == '0' then return '0-1' end
  return task.attempt .. '-' .. task.tokens_logged
end

local function check_log(task)
  local name = key('log', task.task_id)
  local last = redis.call('XREVRANGE', name, '+', '-', 'COUNT', 1)[1]
  local wanted = last_position(task)
  if not last or last[1] ~= wanted then
    found('log-end', name, 'ends at ' .. (last and last[1] or 'nothing') .. ' instead of ' .. wanted .. ' ('
      .. task.state .. ')')
  elseif not is_live(task) and last[2][2] ~= task[last[2][1]] then
    found('log-end', name, 'its last event is not the task\'s')
  end
end

for i = 2, #ARGV do
  local task = task_hash(ARGV[i])
  if task then
    check_waiting(task)
    check_running(task)
    check_ended(task)
    check_indexes(task)
    check_log(task)
  end
end
return findings
