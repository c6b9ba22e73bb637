-- A worker is alive and says what it runs.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 worker id  3 instance id  4 lease in ms  5 status  6 kv blocks free  7 tokens per second
--        8 vram used bytes  9… task id, attempt of each generation it runs
-- Returns { known 1|0, drain 1|0, task id, attempt, … of generations that nobody wants }. Not known: register again.
--@include workers

pass_when_full()
local now = time_ms(ARGV[1])
local id = ARGV[2]
local worker = worker_hash(id)
if not worker or worker.instance_id ~= ARGV[3] then return { 0, 0 } end

-- Found unreachable, it stays lost until somebody reaches it: hearing it isn't enough to send it work.
local unreachable = worker.unreachable == '1'
local expires = integer(now + tonumber(ARGV[4]))
redis.call('HSET', key('worker', id), 'status', ARGV[5], 'lost', unreachable and '1' or '0',
  'lease_ms', ARGV[4], 'lease_expires_at_ms', expires,
  'kv_blocks_free', ARGV[6], 'tokens_per_second', ARGV[7], 'vram_used_bytes', ARGV[8])
local back = worker.lost == '1' and not unreachable
if not unreachable then redis.call('ZADD', key('worker-leases'), expires, id) end
if back then fleet(now, 'worker_back', id, 'heartbeats again') end
local changed = back or worker.status ~= ARGV[5] or tonumber(worker.lease_expires_at_ms) <= now

local reply, runs = { 1, redis.call('HEXISTS', key('drains'), id) }, {}
for i = 9, #ARGV, 2 do
  local task_id, attempt = ARGV[i], ARGV[i + 1]
  runs[task_id .. ':' .. attempt] = true
  local task = redis.call('HMGET', key('task', task_id), 'state', 'attempt', 'worker_id')
  if task[1] ~= 'running' or task[2] ~= attempt or task[3] ~= id then
    reply[#reply + 1] = task_id
    reply[#reply + 1] = attempt
  end
end

-- A heartbeat may have been written before the attempt was stopped, or even before it reached the worker: only one that
-- is a second younger proves that it is gone.
local stopping = redis.call('HGETALL', key('stopping', id))
for i = 1, #stopping, 2 do
  if not runs[stopping[i]] and now - tonumber(stopping[i + 1]) > 1000 then
    redis.call('HDEL', key('stopping', id), stopping[i])
    changed = true
  end
end
if changed then
  bump(worker.model)
  hint('queue')
end
return reply
