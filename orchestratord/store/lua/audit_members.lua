-- Checks that what stands in a set, a queue or an index belongs there.
-- KEYS   1 anchor
-- ARGV   1 repair (1|0)  2 kind of key  3 the key  4 number of its decoded parts  5… the parts, then members
-- Returns invariant, key, detail, repaired 1|0, … of each finding. A member that has left meanwhile has none.
-- Repair removes what doesn't belong.
--@include tasks

local repair, kind, name, count = ARGV[1] == '1', ARGV[2], ARGV[3], tonumber(ARGV[4])
local parts, members = {}, {}
for i = 5, #ARGV do
  if i < 5 + count then parts[#parts + 1] = ARGV[i] else members[#members + 1] = ARGV[i] end
end

local findings = {}
local function found(member, detail, mend)
  if repair then mend() end
  for _, part in ipairs({ 'member', name, member .. ' ' .. detail, repair and 1 or 0 }) do
    findings[#findings + 1] = part
  end
end

local function in_zset(member) return redis.call('ZSCORE', name, member) end
local function in_set(member) return redis.call('SISMEMBER', name, member) == 1 end
local function in_hash(member) return redis.call('HEXISTS', name, member) == 1 end
local function zrem(member) redis.call('ZREM', name, member) end
local function srem(member) redis.call('SREM', name, member) end
local function hdel(member) redis.call('HDEL', name, member) end

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
  ['queue'] = { in_zset, zrem, task_is(function(task)
    return task.state == 'queued' and name == key('queue', task.model) .. ':' .. queue_of(task)
  end) },
  ['waiting-in'] = { in_zset, zrem, task_is(function(task)
    return task.state == 'queued' and task.model == parts[1] and task.priority == parts[2]
  end) },
  ['queues'] = { in_set, srem, function(member)
    if redis.call('EXISTS', key('queue', parts[1]) .. ':' .. member) == 0 then return 'is empty' end
  end },
  ['waiting'] = { in_hash, function(member) count_waiting(member) end, function(member)
    local count = redis.call('HGET', name, member)
    if tonumber(count) ~= waiting_in(member) or count == '0' then
      return 'has ' .. waiting_in(member) .. ' waiting tasks, not ' .. count
    end
  end },
  ['retry'] = { in_zset, zrem, task_is(function(task) return task.state == 'retry' end) },
  ['deadlines'] = { in_zset, zrem, task_is(is_live) },
  ['done'] = { in_zset, zrem, task_is(function(task) return not is_live(task) end) },
  ['tasks-by'] = { in_zset, zrem, task_is(function(task)
    return task.tenant == parts[1] and status_of(task.state) == parts[2] and (not parts[3] or task.model == parts[3])
  end) },
  ['running'] = { in_hash, hdel, task_is(function(task)
    return task.state == 'running' and task.worker_id == parts[1]
      and redis.call('HGET', name, task.task_id) == task.attempt
  end) },
  ['stopping'] = { in_hash, hdel, stopped_attempt },
  ['owned'] = { in_set, srem, task_is(function(task) return task.state == 'running' and task.owner == parts[1] end) },
  ['orphans'] = { in_set, srem, task_is(function(task) return task.state == 'running' and task.owner == '' end) },
  ['active'] = { in_set, srem, live_tenant },
  ['workers'] = { in_set, srem, registered },
  ['workers-of'] = { in_set, srem, function(member)
    if redis.call('HGET', key('worker', member), 'model') ~= parts[1] then return 'has another model' end
  end },
  ['worker-leases'] = { in_zset, zrem, function(member)
    local lost = redis.call('HGET', key('worker', member), 'lost')
    if not lost then return 'is not a worker' end
    if lost == '1' then return 'is lost' end
  end },
  ['drains'] = { in_hash, hdel, registered },
}

local present, remove, wrong = unpack(RULES[kind])
for _, member in ipairs(members) do
  local detail = present(member) and wrong(member)
  if detail then found(member, detail, function() remove(member) end) end
end
return findings
