-- Checks that what stands in sets, queues and indexes belongs there.
-- KEYS   1 anchor
-- ARGV   1 repair (1|0)  2… for each key: its kind, the key, rank to begin at, number of its decoded parts, the parts
-- Returns { rank to go on at for each key (-1: it is done), list of invariant, key, detail, repaired 1|0, … }
--        Sorted sets are looked at from the given rank, WINDOW members a call; sets and hashes, which are small, whole.
-- Repair removes what doesn't belong.
--@include tasks

local WINDOW = 200
local repair = ARGV[1] == '1'
local findings = {}
local name, parts

local ZSET = {
  read = function(start) return redis.call('ZRANGE', name, start, start + WINDOW - 1) end,
  remove = function(member) redis.call('ZREM', name, member) end,
}
local SET = {
  read = function() return redis.call('SMEMBERS', name) end,
  remove = function(member) redis.call('SREM', name, member) end,
}
local HASH = {
  read = function() return redis.call('HKEYS', name) end,
  remove = function(member) redis.call('HDEL', name, member) end,
}
local COUNTS = { read = HASH.read, remove = function(member) count_waiting(member) end }

local function task_is(test)
  return function(member)
    local task = task_hash(member)
    if not task then return 'is not a task' end
    if not test(task) then return 'is ' .. task.state .. ' and should not be here' end
  end
end

local function live_tenant(member)
  if redis.call('EXISTS', key('tasks-by', member, 'queued', parts[1])) == 1 then return end
  if redis.call('EXISTS', key('tasks-by', member, 'running', parts[1])) == 1 then return end
  return 'has no task here'
end

local function stopped_attempt(member)
  local task_id, attempt = string.match(member, '^(.*):(%d+)$')
  local task = task_id and redis.call('HMGET', key('task', task_id), 'state', 'attempt', 'worker_id')
  if not task then return 'is not an attempt' end
  if task[1] == 'running' and task[2] == attempt and task[3] == parts[1] then return 'is still running' end
end

local function registered(member)
  if redis.call('EXISTS', key('worker', member)) == 0 then return 'is not a worker' end
end

local RULES = {
  ['queue'] = { ZSET, task_is(function(task)
    return task.state == 'queued' and name == key('queue', task.model) .. ':' .. queue_of(task)
  end) },
  ['waiting-in'] = { ZSET, task_is(function(task)
    return task.state == 'queued' and task.model == parts[1] and task.priority == parts[2]
  end) },
  ['queues'] = { SET, function(member)
    if redis.call('EXISTS', key('queue', parts[1]) .. ':' .. member) == 0 then return 'is empty' end
  end },
  ['waiting'] = { COUNTS, function(member)
    local count = redis.call('HGET', name, member)
    if tonumber(count) ~= waiting_in(member) or count == '0' then
      return 'has ' .. waiting_in(member) .. ' waiting tasks, not ' .. count
    end
  end },
  ['retry'] = { ZSET, task_is(function(task) return task.state == 'retry' end) },
  ['deadlines'] = { ZSET, task_is(is_live) },
  ['done'] = { ZSET, task_is(function(task) return not is_live(task) end) },
  ['tasks-by'] = { ZSET, task_is(function(task)
    return task.tenant == parts[1] and status_of(task.state) == parts[2] and (not parts[3] or task.model == parts[3])
  end) },
  ['running'] = { HASH, task_is(function(task)
    return task.state == 'running' and task.worker_id == parts[1]
      and redis.call('HGET', name, task.task_id) == task.attempt
  end) },
  ['stopping'] = { HASH, stopped_attempt },
  ['owned'] = { SET, task_is(function(task) return task.state == 'running' and task.owner == parts[1] end) },
  ['orphans'] = { SET, task_is(function(task) return task.state == 'running' and task.owner == '' end) },
  ['attended'] = { SET, task_is(function(task) return is_live(task) and task.attended_by == parts[1] end) },
  ['unattended'] = { ZSET, task_is(is_live) },
  ['active'] = { SET, live_tenant },
  ['workers'] = { SET, registered },
  ['workers-of'] = { SET, function(member)
    if redis.call('HGET', key('worker', member), 'model') ~= parts[1] then return 'has another model' end
  end },
  ['worker-leases'] = { ZSET, function(member)
    local lost = redis.call('HGET', key('worker', member), 'lost')
    if not lost then return 'is not a worker' end
    if lost == '1' then return 'is lost' end
  end },
  ['drains'] = { HASH, registered },
}

local counts = {}
local at = 2
while ARGV[at] do
  local form, wrong = unpack(RULES[ARGV[at]])
  name, parts = ARGV[at + 1], {}
  local start, last = tonumber(ARGV[at + 2]), at + 3 + tonumber(ARGV[at + 3])
  for i = at + 4, last do parts[#parts + 1] = ARGV[i] end
  local members = form.read(start)
  local kept = 0
  for _, member in ipairs(members) do
    local detail = wrong(member)
    if detail and repair then form.remove(member) else kept = kept + 1 end
    if detail then
      for _, part in ipairs({ 'member', name, member .. ' ' .. detail, repair and 1 or 0 }) do
        findings[#findings + 1] = part
      end
    end
  end
  -- What was removed has moved the rest down.
  counts[#counts + 1] = #members == WINDOW and start + kept or -1
  at = last + 1
end
return { counts, findings }
