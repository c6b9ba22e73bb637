-- Where a task's log begins and ends.
-- KEYS   1 anchor
-- ARGV   1 task id
-- Returns { first position, last position }, nil when there is no log.

local name = key('log', ARGV[1])
local first = redis.call('XRANGE', name, '-', '+', 'COUNT', 1)[1]
if not first then return false end
return { first[1], redis.call('XREVRANGE', name, '+', '-', 'COUNT', 1)[1][1] }
