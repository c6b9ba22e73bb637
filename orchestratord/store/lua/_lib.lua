-- In front of every script: time, numbers, tasks and workers as tables, hints.

-- Redis 7+ lets a script that has already written go on at maxmemory. A write that needs no memory, done first, lets
-- everything but `admit` pass: it concerns tasks and workers that were accepted before, and mostly frees memory.
local function pass_when_full()
  redis.call('DEL', key('none'))
end

local function integer(number)
  return string.format('%.0f', number)
end

local function exact(number)
  return string.format('%.17g', number)
end

-- Milliseconds: the caller's, or Redis' own clock.
local function time_ms(given)
  if given ~= '' then return tonumber(given) end
  local parts = redis.call('TIME')
  return tonumber(parts[1]) * 1000 + math.floor(tonumber(parts[2]) / 1000)
end

local function hash(name)
  local flat = redis.call('HGETALL', name)
  if #flat == 0 then return nil end
  local fields = {}
  for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
  return fields
end

local function task_hash(task_id)
  return hash(key('task', task_id))
end

local function worker_hash(worker_id)
  return hash(key('worker', worker_id))
end

-- The named fields' values in order, false (nil for the client) where one is missing.
local function pick(fields, names)
  local values = {}
  for i, name in ipairs(names) do values[i] = fields[name] or false end
  return values
end

local function hint(name)
  redis.call('PUBLISH', '{o}:hint:' .. name, '')
end

-- Plans made before this are no longer claimed.
local function bump(model)
  redis.call('INCR', key('version', model))
end

local function fleet(now, kind, subject, text)
  local position = redis.call('XADD', key('fleet'), 'MAXLEN', '~', 2000, '*', 'at', integer(now), 'kind', kind,
    'subject', subject, 'text', text)
  hint('fleet')
  return position
end
