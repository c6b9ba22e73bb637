-- Queues a new task, or finds the one that was admitted under the same id or idempotency key.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 call id  3 per model  4 per tenant  5 total  6 drop_oldest_batch (1|0)  7 memory full (1|0)
--        8 payload  9 error event (JSON) for a task that is dropped  10 task id is the client's (1|0)
--        11… field, value pairs of the task hash
-- Returns { 'admitted', task_id, created 1|0, seed, created_at_ms, position, state, model }
--         { 'refused', reason, limit }: nothing was written
-- Keys   A key stands for one body and one task, as long as that is kept; a task may have several keys. A task that was
--        cancelled because its reader left is not what a repeat asks for: the key then goes to a new task.
-- Event  queued at 0-1. With drop_oldest_batch an interactive task that meets a limit ends one waiting batch task
--        (the oldest that relieves every limit met) with an error event.
--@include tasks

local now = time_ms(ARGV[1])
local task = {}
local flat = {}
for i = 11, #ARGV do flat[#flat + 1] = ARGV[i] end
for i = 1, #flat, 2 do task[flat[i]] = flat[i + 1] end

local function known(existing)
  if is_live(existing) and task.attended_by then attend(existing, task.attended_by, now) end
  local created = existing.admit_call == ARGV[2] and 1 or 0
  return { 'admitted', existing.task_id, created, existing.seed, existing.created_at_ms, position(existing),
    existing.state, existing.model }
end

local idem = task.idempotency_key and key('idem', task.tenant, task.idempotency_key)
local by_id = task_hash(task.task_id)
local by_key = idem and task_hash(redis.call('GET', idem) or '')
local function other(existing)
  return existing and (existing.tenant ~= task.tenant or existing.body_hash ~= task.body_hash)
end
if other(by_id) or other(by_key) then return { 'refused', 'conflict', 0 } end
if by_key and by_key.abandoned == '1' and by_key.task_id ~= task.task_id then by_key = nil end
if by_key then
  if ARGV[10] == '1' and by_key.task_id ~= task.task_id then return { 'refused', 'conflict_pair', 0 } end
  return known(by_key)
end
if by_id then
  if idem then
    if not add_key(by_id, task.idempotency_key) then return { 'refused', 'conflict_keys', MAX_KEYS } end
    redis.call('SET', idem, task.task_id)
  end
  return known(by_id)
end

if redis.call('SISMEMBER', key('models'), task.model) == 0 then return { 'refused', 'model_unknown', 0 } end
if ARGV[7] == '1' then return { 'refused', 'memory', 0 } end

local function total_waiting()
  local total = redis.call('ZCARD', key('retry'))
  for _, count in ipairs(redis.call('HVALS', key('waiting'))) do total = total + tonumber(count) end
  return total
end

local full = {}
local refusal
local function check(name, count, limit)
  if count < tonumber(limit) then return end
  full[name] = true
  refusal = refusal or { 'refused', 'queue_full_' .. name, tonumber(limit) }
end
check('tenant', redis.call('ZCARD', key('tasks-by', task.tenant, 'queued')), ARGV[4])
check('model', waiting_in(task.model), ARGV[3])
check('total', total_waiting(), ARGV[5])

-- The oldest waiting batch task whose end relieves every limit that was met.
local function victim()
  local oldest, oldest_sequence
  local function consider(queue)
    local head = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
    if head[1] and (not oldest or tonumber(head[2]) < oldest_sequence) then
      oldest, oldest_sequence = head[1], tonumber(head[2])
    end
  end
  local models = full.model and { task.model } or redis.call('HKEYS', key('waiting'))
  for _, model in ipairs(models) do
    if full.tenant then
      local own = 'batch:' .. encode(task.tenant)
      for _, tail in ipairs(redis.call('SMEMBERS', key('queues', model))) do
        if tail == own or string.sub(tail, 1, #own + 1) == own .. ':' then
          consider(key('queue', model) .. ':' .. tail)
        end
      end
    else
      consider(key('waiting-in', model, 'batch'))
    end
  end
  return oldest
end

if refusal then
  local dropped = ARGV[6] == '1' and task.priority == 'interactive' and victim()
  if not dropped then return refusal end
  local other = task_hash(dropped)
  unwait(other)
  finish(other, now, 'failed', 'error', ARGV[9], ARGV[2])
end

task.sequence = integer(redis.call('INCR', key('sequence')))
update(task, {
  sequence = task.sequence, created_at_ms = integer(now), state = 'queued', admit_call = ARGV[2], owner = '',
  attempt = '0', failures = '0', preemptions = '0', tokens_logged = '0', tokens_in = '0', cached_tokens = '0',
  charged = '0', worker_id = '',
})
redis.call('HSET', key('task', task.task_id), unpack(flat))
redis.call('SET', key('payload', task.task_id), ARGV[8])
if idem then redis.call('SET', idem, task.task_id) end
if task.attended_by then attend(task, task.attended_by, now) end
if task.deadline_at_ms then redis.call('ZADD', key('deadlines'), task.deadline_at_ms, task.task_id) end

-- A tenant that comes back is lifted to those it joins: idle time earns no credit. With nobody there, it is lifted to
-- whoever left last ("Fairness in Serving Large Language Models", OSDI 2024, algorithm 2).
local active = key('active', task.model)
if redis.call('SISMEMBER', active, task.tenant) == 0 then
  local vtime = key('vtime', task.model)
  local floor
  for _, tenant in ipairs(redis.call('SMEMBERS', active)) do
    local theirs = tonumber(redis.call('HGET', vtime, tenant) or '0')
    if not floor or theirs < floor then floor = theirs end
  end
  floor = floor or tonumber(redis.call('GET', key('vtime-left', task.model)) or '0')
  if tonumber(redis.call('HGET', vtime, task.tenant) or '0') < floor then
    redis.call('HSET', vtime, task.tenant, exact(floor))
  end
  redis.call('SADD', active, task.tenant)
end

index(task, 'queued')
enqueue(task, now)
local place = position(task)
redis.call('XADD', key('log', task.task_id), '0-1', 'queued',
  '{"task_id":' .. cjson.encode(task.task_id) .. ',"queue_position":' .. place .. '}')
compact_log(task)
return { 'admitted', task.task_id, 1, task.seed, integer(now), place, 'queued', task.model }
