-- Gives waiting tasks to workers: the planner's decision, taken only if nothing it was based on has changed.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 replica  3 model  4 version of the snapshot  5 call id
--        6… task id, worker id, charge (tokens) of each assignment
-- Returns a list of { running task fields (RUNNING_FIELDS), payload }, one for each assignment that took effect; empty
--        when the version is another one. A call that is repeated with its id returns what it did the first time.
-- Event  <attempt>-<tokens kept> started for the first attempt, migrated (with the reason of the last requeue) for later
--        ones. The id has the tokens, so that its holder's place is known even when a failover undoes this entry.
--@include tasks
--@include workers

pass_when_full()
local now = time_ms(ARGV[1])
local replica, model, version, call = ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local function claimed(task)
  return { pick(task, RUNNING_FIELDS), redis.call('GET', key('payload', task.task_id)) }
end

local repeated = {}
for i = 6, #ARGV, 3 do
  local task = task_hash(ARGV[i])
  if task and task.last_call == call and task.state == 'running' then repeated[#repeated + 1] = claimed(task) end
end
if #repeated > 0 then return repeated end
if (redis.call('GET', key('version', model)) or '0') ~= version then return {} end

local function takes_work(worker)
  return worker and worker.model == model and worker_state(worker, now) == 'ready'
    and slots_used(worker.worker_id) < tonumber(worker.slots_total)
end

local function may_run(task, worker)
  if not task or task.state ~= 'queued' or task.model ~= model then return false end
  if task.deadline_at_ms and tonumber(task.deadline_at_ms) <= now then return false end
  if task.pin_worker and task.pin_worker ~= worker.worker_id then return false end
  if task.pin_pool and task.pin_pool ~= worker.pool then return false end
  return task.tokens_logged == '0' or (task.digest == worker.model_digest and task.dtype == worker.dtype)
end

local function event(task, worker)
  local head = '{"task_id":' .. cjson.encode(task.task_id) .. ',"worker_id":' .. cjson.encode(worker.worker_id)
    .. ',"attempt":' .. task.attempt
  if task.attempt ~= '1' then
    return 'migrated', head .. ',"reason":' .. cjson.encode(task.requeue_reason) .. ',"tokens_kept":'
      .. task.tokens_logged .. '}'
  end
  -- The seed is an int64: as text it stays exact.
  return 'started', head .. ',"model":' .. cjson.encode(task.model) .. ',"model_digest":'
    .. cjson.encode(worker.model_digest) .. ',"seed":' .. task.seed .. ',"determinism":'
    .. cjson.encode(worker.determinism) .. ',"started_at_ms":' .. integer(now) .. '}'
end

local SESSION_TTL_MS, PREFIX_LIMIT, WORKERS_PER_PREFIX = 7 * 24 * 3600 * 1000, 8192, 4

-- Where a session and a prompt's prefixes are warm, for the next decisions; the prefix index is approximate and bounded.
local function remember(task, worker)
  if task.session_id then
    local session = key('session', task.tenant, task.session_id)
    redis.call('HSET', session, model, worker.worker_id)
    redis.call('PEXPIRE', session, SESSION_TTL_MS)
  end
  local index, ages = key('prefix', model), key('prefix-age', model)
  for prefix in string.gmatch(task.prefix_hashes or '', '%S+') do
    local warm, count = worker.worker_id, 1
    for other in string.gmatch(redis.call('HGET', index, prefix) or '', '%S+') do
      if other ~= worker.worker_id and count < WORKERS_PER_PREFIX then warm, count = warm .. ' ' .. other, count + 1 end
    end
    redis.call('HSET', index, prefix, warm)
    redis.call('ZADD', ages, integer(now), prefix)
  end
  local surplus = redis.call('ZCARD', ages) - PREFIX_LIMIT
  if surplus <= 0 then return end
  for _, prefix in ipairs(redis.call('ZRANGE', ages, 0, surplus - 1)) do
    redis.call('HDEL', index, prefix)
    redis.call('ZREM', ages, prefix)
  end
end

local function start(task, worker, charge)
  dequeue(task)
  set_state(task, 'running', {
    attempt = integer(tonumber(task.attempt) + 1), worker_id = worker.worker_id, worker_url = worker.url,
    instance_id = worker.instance_id, owner = replica, digest = worker.model_digest, dtype = worker.dtype,
    claimed_at_ms = integer(now), started_at_ms = task.started_at_ms or integer(now), tokens_kept = task.tokens_logged,
    charged = exact(tonumber(task.charged) + tonumber(charge)), last_call = call,
  })
  redis.call('HSET', key('running', worker.worker_id), task.task_id, task.attempt)
  own(task.task_id, replica, now)
  redis.call('HINCRBYFLOAT', key('vtime', model), task.tenant, exact(tonumber(charge) / tonumber(task.weight)))
  redis.call('XADD', key('log', task.task_id), task.attempt .. '-' .. task.tokens_logged, event(task, worker))
  remember(task, worker)
  publish_task(task)
end

local result = {}
for i = 6, #ARGV, 3 do
  local task, worker = task_hash(ARGV[i]), worker_hash(ARGV[i + 1])
  if takes_work(worker) and may_run(task, worker) then
    start(task, worker, ARGV[i + 2])
    result[#result + 1] = claimed(task)
  end
end
if #result > 0 then bump(model) end
return result
