-- A task's places: queue, running set, owner, indexes. Each function keeps every key that says the same thing in step.

local function is_live(task)
  return task.state == 'queued' or task.state == 'retry' or task.state == 'running'
end

-- What clients call the state: a task that waits out a backoff is queued.
local function status_of(state)
  if state == 'retry' then return 'queued' end
  return state
end

local function update(task, changes)
  local flat = {}
  for name, value in pairs(changes) do
    task[name] = value
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call('HSET', key('task', task.task_id), unpack(flat))
end

local function unindex(task, status)
  redis.call('ZREM', key('tasks-by', task.tenant, status), task.task_id)
  redis.call('ZREM', key('tasks-by', task.tenant, status, task.model), task.task_id)
end

local function index(task, status)
  redis.call('ZADD', key('tasks-by', task.tenant, status), task.sequence, task.task_id)
  redis.call('ZADD', key('tasks-by', task.tenant, status, task.model), task.sequence, task.task_id)
end

local function set_state(task, state, changes)
  local before, after = status_of(task.state), status_of(state)
  changes.state = state
  update(task, changes)
  if before ~= after then
    unindex(task, before)
    index(task, after)
  end
end

-- Tail of the queue's key. Tasks that only some workers may take wait apart (`lane`), and so do continuations, which
-- need the weights they began with: none of them stands in the way of the tenant's other tasks.
local function queue_of(task)
  local lane = task.lane
  if task.tokens_logged ~= '0' then lane = lane .. '|' .. task.digest .. '|' .. task.dtype end
  local tail = encode(task.priority) .. ':' .. encode(task.tenant)
  if lane ~= '' then tail = tail .. ':' .. encode(lane) end
  return tail
end

local function waiting_in(model)
  return redis.call('ZCARD', key('waiting-in', model, 'interactive'))
    + redis.call('ZCARD', key('waiting-in', model, 'batch'))
end

local function count_waiting(model)
  local count = waiting_in(model)
  if count == 0 then
    redis.call('HDEL', key('waiting'), model)
  else
    redis.call('HSET', key('waiting'), model, count)
  end
end

local function enqueue(task, now)
  update(task, { waiting_since_ms = integer(now) })
  local tail = queue_of(task)
  redis.call('ZADD', key('queue', task.model) .. ':' .. tail, task.sequence, task.task_id)
  redis.call('SADD', key('queues', task.model), tail)
  redis.call('ZADD', key('waiting-in', task.model, task.priority), task.sequence, task.task_id)
  count_waiting(task.model)
  hint('queue')
end

local function dequeue(task)
  local tail = queue_of(task)
  local queue = key('queue', task.model) .. ':' .. tail
  redis.call('ZREM', queue, task.task_id)
  if redis.call('EXISTS', queue) == 0 then redis.call('SREM', key('queues', task.model), tail) end
  redis.call('ZREM', key('waiting-in', task.model, task.priority), task.task_id)
  count_waiting(task.model)
end

-- 1 for the task that is next in its model; 0 for one that doesn't wait.
local function position(task)
  if status_of(task.state) ~= 'queued' then return 0 end
  local before = '(' .. task.sequence
  if task.priority == 'interactive' then
    return redis.call('ZCOUNT', key('waiting-in', task.model, 'interactive'), '-inf', before) + 1
  end
  return redis.call('ZCARD', key('waiting-in', task.model, 'interactive'))
    + redis.call('ZCOUNT', key('waiting-in', task.model, 'batch'), '-inf', before) + 1
end

local function disown(task)
  redis.call('SREM', key('owned', task.owner), task.task_id)
  redis.call('SREM', key('orphans'), task.task_id)
end

-- Makes a replica the owner. One without a lease (it was given up as dead, or has not spoken yet) gets one that has ended:
-- whoever owns a task can be found dead.
local function own(task_id, replica, now)
  redis.call('SADD', key('owned', replica), task_id)
  redis.call('ZADD', key('replicas'), 'NX', integer(now), replica)
end

-- Whom a task is generated for, where it is to end when its reader leaves: the replica that streams it. `unattended` has
-- those whose replica has gone, by when that was noticed, until a reader comes back or the grace is over.
local function unattend(task)
  if task.attended_by then redis.call('SREM', key('attended', task.attended_by), task.task_id) end
  redis.call('ZREM', key('unattended'), task.task_id)
end

local function attend(task, replica, now)
  if task.on_disconnect ~= 'cancel' then return end
  unattend(task)
  update(task, { attended_by = replica })
  redis.call('SADD', key('attended', replica), task.task_id)
  redis.call('ZADD', key('replicas'), 'NX', integer(now), replica)
end

-- The replica has gone, and its readers with it.
local function lose_readers(replica, now)
  for _, task_id in ipairs(redis.call('SMEMBERS', key('attended', replica))) do
    redis.call('ZADD', key('unattended'), integer(now), task_id)
  end
  redis.call('DEL', key('attended', replica))
end

-- The idempotency keys of a task, apart by newlines, which no key holds. False when it has too many.
local MAX_KEYS = 64
local function keys_of(task)
  local found = {}
  for name in string.gmatch(task.idempotency_key or '', '[^\n]+') do found[#found + 1] = name end
  return found
end

local function add_key(task, name)
  local names = keys_of(task)
  for _, known in ipairs(names) do
    if known == name then return true end
  end
  if #names >= MAX_KEYS then return false end
  names[#names + 1] = name
  update(task, { idempotency_key = table.concat(names, '\n') })
  return true
end

local function free_slot(task)
  redis.call('HDEL', key('running', task.worker_id), task.task_id)
end

-- The slot stays taken until the worker confirms that the attempt has stopped, unless nothing can run there any more.
local function stop_at_worker(task, now)
  free_slot(task)
  local worker = redis.call('HMGET', key('worker', task.worker_id), 'instance_id', 'lost')
  if worker[1] == task.instance_id and worker[2] ~= '1' then
    redis.call('HSET', key('stopping', task.worker_id), task.task_id .. ':' .. task.attempt, integer(now))
  end
end

-- Virtual time is what the claim guessed; make it what was served: prompt and generated tokens, over the weight.
local function settle(task)
  if task.attempt == '0' then return end
  local prompt = tonumber(task.tokens_in)
  if prompt == 0 then prompt = tonumber(task.prompt_tokens_estimate) end
  local served = prompt + tonumber(task.tokens_logged)
  local owed = served - tonumber(task.charged)
  if owed == 0 then return end
  redis.call('HINCRBYFLOAT', key('vtime', task.model), task.tenant, exact(owed / tonumber(task.weight)))
  update(task, { charged = exact(served) })
end

-- A tenant with nothing left in a model is no longer measured against; the last one leaves its virtual time behind, so
-- that whoever comes next doesn't owe the past to those who were idle.
local function leave_if_idle(task)
  if redis.call('ZCARD', key('tasks-by', task.tenant, 'queued', task.model)) > 0 then return end
  if redis.call('ZCARD', key('tasks-by', task.tenant, 'running', task.model)) > 0 then return end
  redis.call('SREM', key('active', task.model), task.tenant)
  if redis.call('EXISTS', key('active', task.model)) == 0 then
    redis.call('SET', key('vtime-left', task.model), redis.call('HGET', key('vtime', task.model), task.tenant) or '0')
  end
end

local function publish_task(task)
  hint('log:' .. task.task_id)
end

-- A stream's newest block is allocated at its full 4 KiB, whatever it holds; a copy takes what its entries need. Done to
-- logs that nothing is appended to for a while: those of tasks that wait and of tasks that have ended.
local function compact_log(task)
  local name, copy = key('log', task.task_id), key('none')
  redis.call('COPY', name, copy)
  redis.call('RENAME', copy, name)
end

local TERMINAL = '18446744073709551615'

-- The one terminal transition. The task has left its queue, its slot and its retry place before.
local function finish(task, now, state, kind, data, call)
  disown(task)
  unattend(task)
  redis.call('DEL', key('payload', task.task_id))
  redis.call('ZREM', key('deadlines'), task.task_id)
  redis.call('XADD', key('log', task.task_id), task.attempt .. '-' .. TERMINAL, kind, data)
  compact_log(task)
  set_state(task, state, { finished_at_ms = integer(now), [kind] = data, last_call = call })
  redis.call('ZADD', key('done'), integer(now), task.task_id)
  if task.callback_url then redis.call('ZADD', key('webhooks'), integer(now), task.task_id) end
  settle(task)
  leave_if_idle(task)
  publish_task(task)
end

-- Takes a task that isn't running out of where it waits.
local function unwait(task)
  if task.state == 'retry' then
    redis.call('ZREM', key('retry'), task.task_id)
  else
    dequeue(task)
  end
end

local function error_json(code, message, retriable)
  return '{"code":"' .. code .. '","message":' .. cjson.encode(message)
    .. (retriable and ',"retriable":true}' or '}')
end

local function fail_deadline(task, now, call)
  finish(task, now, 'failed', 'error',
    error_json('DEADLINE_MISSED', 'the task did not finish by its deadline'), call)
end
