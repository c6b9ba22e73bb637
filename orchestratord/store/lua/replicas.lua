-- Every orchestratord with a lease, running or just ended.
-- KEYS   1 anchor
-- Returns replica, url or nil, lease's end in ms, …

local result = {}
local leases = redis.call('ZRANGE', key('replicas'), 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do
  result[#result + 1] = leases[i]
  result[#result + 1] = redis.call('HGET', key('replica-urls'), leases[i])
  result[#result + 1] = leases[i + 1]
end
return result
