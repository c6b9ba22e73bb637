-- A reader has come at a replica. Nothing for a task that has ended, or goes on whoever reads it.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 task id  3 tenant or ''  4 replica
-- Returns 1 when the task is attended there now
--@include tasks

pass_when_full()
local task = task_hash(ARGV[2])
if not task or not is_live(task) or task.on_disconnect ~= 'cancel' then return 0 end
if ARGV[3] ~= '' and task.tenant ~= ARGV[3] then return 0 end
attend(task, ARGV[4], time_ms(ARGV[1]))
return 1
