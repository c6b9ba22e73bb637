-- Tasks that are to end when their reader leaves, and whose readers' replica has gone.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 grace in ms  3 limit
-- Returns a list of task id, 1 when the grace is over else 0, …; the longest unattended first
--@include tasks

local before = time_ms(ARGV[1]) - tonumber(ARGV[2])
local found = redis.call('ZRANGE', key('unattended'), 0, tonumber(ARGV[3]) - 1, 'WITHSCORES')
for i = 2, #found, 2 do found[i] = tonumber(found[i]) <= before and 1 or 0 end
return found
