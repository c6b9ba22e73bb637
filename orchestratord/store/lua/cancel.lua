-- Ends a task because somebody asked. The log is sealed at once; a running attempt keeps its slot until it is released.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 call id  3 task id  4 tenant or ''
--        5 nobody reads it any more (1|0): a repeat of the request under its idempotency key begins anew
--        6 the replica whose reader has left, or '': nothing happens where a later one reads it elsewhere
-- Returns nil when the tenant has no such task, else { state, changed 1|0, running task fields or false }
-- Event  <attempt>-<max> end CANCELLED
--@include tasks

pass_when_full()
local now = time_ms(ARGV[1])
local call = ARGV[2]
local task = task_hash(ARGV[3])
if not task or (ARGV[4] ~= '' and task.tenant ~= ARGV[4]) then return false end
if not is_live(task) then
  if task.state == 'cancelled' and task.last_call == call then
    return { task.state, 1, task.stopped_running == '1' and pick(task, RUNNING_FIELDS) }
  end
  return { task.state, 0, false }
end

if ARGV[6] ~= '' and task.attended_by and task.attended_by ~= ARGV[6] then return { task.state, 0, false } end

local running = false
if task.state == 'running' then
  running = pick(task, RUNNING_FIELDS)
  stop_at_worker(task, now)
  bump(task.model)
else
  unwait(task)
end
update(task, { stopped_running = running and '1' or '0', abandoned = ARGV[5] })
finish(task, now, 'cancelled', 'end', '{"stop_reason":"CANCELLED","tokens_in":' .. task.tokens_in .. ',"tokens_out":'
  .. task.tokens_logged .. ',"cached_tokens":' .. task.cached_tokens .. ',"queue_time_ms":'
  .. integer(math.max(0, tonumber(task.started_at_ms or now) - tonumber(task.created_at_ms))) .. '}', call)
hint('queue')
hint('cancel:' .. task.task_id)
return { 'cancelled', 1, running }
