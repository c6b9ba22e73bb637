-- What time alone changes: due retries wait again, missed deadlines end tasks, silent workers are lost.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 call id  3 limit of each step  4 ms for which Redis has been reachable
--        5 latest believable now or ''
-- Returns { now_ms, believable 1|0, retried, expired while waiting, list of running task fields that expired,
--        list of workers lost }. The running ones must be stopped at their workers; what ran on a lost worker stays
--        running until its owner sends it back.
-- Event  <attempt>-<max> error DEADLINE_MISSED
--@include tasks
--@include workers

pass_when_full()
local now = time_ms(ARGV[1])
local call, limit, healthy = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local believable = ARGV[5] == '' or now <= tonumber(ARGV[5])

local function due(name)
  return redis.call('ZRANGEBYSCORE', name, '-inf', integer(now), 'LIMIT', 0, limit)
end

local retried = 0
for _, task_id in ipairs(due(key('retry'))) do
  local task = task_hash(task_id)
  redis.call('ZREM', key('retry'), task_id)
  if task and task.state == 'retry' then
    set_state(task, 'queued', {})
    enqueue(task, now)
    bump(task.model)
    retried = retried + 1
  end
end

local expired_waiting, expired_running = 0, {}
for _, task_id in ipairs(due(key('deadlines'))) do
  local task = task_hash(task_id)
  redis.call('ZREM', key('deadlines'), task_id)
  if task and is_live(task) then
    if task.state == 'running' then
      expired_running[#expired_running + 1] = pick(task, RUNNING_FIELDS)
      stop_at_worker(task, now)
      bump(task.model)
    else
      unwait(task)
      expired_waiting = expired_waiting + 1
    end
    fail_deadline(task, now, call)
    hint('cancel:' .. task_id)
  end
end

local lost = {}
if believable then
  for _, worker_id in ipairs(due(key('worker-leases'))) do
    local worker = worker_hash(worker_id)
    if not worker then
      redis.call('ZREM', key('worker-leases'), worker_id)
    elseif healthy >= tonumber(worker.lease_ms) then
      lose(worker, now, 'no heartbeat within ' .. worker.lease_ms .. ' ms')
      lost[#lost + 1] = worker_id
    end
  end
end
return { integer(now), believable and 1 or 0, retried, expired_waiting, expired_running, lost }
