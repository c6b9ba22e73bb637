-- One model's queue and workers at one instant, for the planner.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 model  3 tasks to read of each queue
-- Returns { version, now_ms, list of { queued task fields (QUEUED_FIELDS), session's worker or false },
--        list of running task fields, list of worker views, tenant, virtual time, …, prefix, workers, … }
--@include workers

local now = time_ms(ARGV[1])
local model, per_queue = ARGV[2], tonumber(ARGV[3])

local waiting, prefixes, seen = {}, {}, {}
for _, tail in ipairs(redis.call('SMEMBERS', key('queues', model))) do
  local queue = key('queue', model) .. ':' .. tail
  for _, task_id in ipairs(redis.call('ZRANGE', queue, 0, per_queue - 1)) do
    local task = task_hash(task_id) or { tenant = '' }
    local session = task.session_id and redis.call('HGET', key('session', task.tenant, task.session_id), model)
    if task.task_id then waiting[#waiting + 1] = { pick(task, QUEUED_FIELDS), session or false } end
    for prefix in string.gmatch(task.prefix_hashes or '', '%S+') do
      if not seen[prefix] then
        seen[prefix] = true
        prefixes[#prefixes + 1] = prefix
      end
    end
  end
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
