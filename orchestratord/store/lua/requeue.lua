-- Sends a running attempt back to its old place in the queue, or ends the task when it has failed too often.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 call id  3 task id  4 attempt  5 reason  6 counts as a failure (1|0)
--        7 made progress, which forgives earlier failures (1|0)  8 worker to avoid or ''  9 backoff in ms
--        10 failures that end the task  11 error event (JSON) that ends it
-- Returns { queued|retry|failed|stale, failures }
-- Event  none when it waits again (the next claim appends migrated); <attempt>-<max> error when it ends:
--        RETRIES_EXHAUSTED, or DEADLINE_MISSED when its deadline has passed.
--@include tasks

pass_when_full()
local now = time_ms(ARGV[1])
local call = ARGV[2]
local task = task_hash(ARGV[3])
if not task or task.attempt ~= ARGV[4] then return { 'stale', 0 } end
if task.state ~= 'running' then
  if task.last_call ~= call then return { 'stale', 0 } end
  return { task.state, tonumber(task.failures) }
end

local failures = tonumber(task.failures)
if ARGV[7] == '1' then failures = 0 end
if ARGV[6] == '1' then failures = failures + 1 end

free_slot(task)
bump(task.model)
update(task, { failures = integer(failures), requeue_reason = ARGV[5], avoid_worker = ARGV[8] })
if ARGV[5] == 'preempted' then update(task, { preemptions = integer(tonumber(task.preemptions) + 1) }) end

if ARGV[6] == '1' and failures >= tonumber(ARGV[10]) then
  finish(task, now, 'failed', 'error', ARGV[11], call)
  return { 'failed', failures }
end
if task.deadline_at_ms and tonumber(task.deadline_at_ms) <= now then
  fail_deadline(task, now, call)
  return { 'failed', failures }
end

disown(task)
settle(task)
local backoff = tonumber(ARGV[9])
local state = backoff > 0 and 'retry' or 'queued'
set_state(task, state, { last_call = call, owner = '' })
if state == 'retry' then
  update(task, { retry_at_ms = integer(now + backoff) })
  redis.call('ZADD', key('retry'), task.retry_at_ms, task.task_id)
else
  enqueue(task, now)
end
publish_task(task)
hint('queue')
return { state, failures }
