-- One model's queue and workers at one instant, for the planner.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 model  3 tasks to read of each queue; fewer where there are so many queues that more than
--        TASKS_READ would be read, but always the first
-- Returns { version, now_ms, list of { queued task fields (QUEUED_FIELDS), session's worker or false },
--        list of running task fields, list of worker views, tenant, virtual time, …, prefix, workers, … }
--@include workers

local TASKS_READ = 1024
local now = time_ms(ARGV[1])
local model, per_queue = ARGV[2], tonumber(ARGV[3])

local at = {}
for i, name in ipairs(QUEUED_FIELDS) do at[name] = i end
local waiting, prefixes, seen = {}, {}, {}

local function read(task_id)
  local task = redis.call('HMGET', key('task', task_id), unpack(QUEUED_FIELDS))
  if not task[at.task_id] then return end
  local session = task[at.session_id]
  local warm = session and redis.call('HGET', key('session', task[at.tenant], session), model)
  waiting[#waiting + 1] = { task, warm or false }
  for prefix in string.gmatch(task[at.prefix_hashes] or '', '%S+') do
    if not seen[prefix] then
      seen[prefix] = true
      prefixes[#prefixes + 1] = prefix
    end
  end
end

local tails = redis.call('SMEMBERS', key('queues', model))
per_queue = math.max(1, math.min(per_queue, math.floor(TASKS_READ / math.max(1, #tails))))
for _, tail in ipairs(tails) do
  for _, task_id in ipairs(redis.call('ZRANGE', key('queue', model) .. ':' .. tail, 0, per_queue - 1)) do read(task_id) end
end

local running, workers = {}, {}
for _, worker_id in ipairs(redis.call('SMEMBERS', key('workers-of', model))) do
  local worker = worker_hash(worker_id)
  if worker then workers[#workers + 1] = worker_view(worker, now) end
  for _, task_id in ipairs(redis.call('HKEYS', key('running', worker_id))) do
    running[#running + 1] = redis.call('HMGET', key('task', task_id), unpack(RUNNING_FIELDS))
  end
end

local warm = {}
for _, prefix in ipairs(prefixes) do
  local where = redis.call('HGET', key('prefix', model), prefix)
  if where then
    warm[#warm + 1] = prefix
    warm[#warm + 1] = where
  end
end
return { redis.call('GET', key('version', model)) or '0', integer(now), waiting, running, workers,
  redis.call('HGETALL', key('vtime', model)), warm }
