-- An orchestratord is alive.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 replica  3 url  4 lease in ms
-- Returns now_ms.

pass_when_full()
local now = time_ms(ARGV[1])
redis.call('ZADD', key('replicas'), integer(now + tonumber(ARGV[4])), ARGV[2])
if redis.call('HSET', key('replica-urls'), ARGV[2], ARGV[3]) == 1 then
  fleet(now, 'replica_joined', ARGV[2], ARGV[3])
end
redis.call('HSET', key('replica-leases'), ARGV[2], ARGV[4])
return integer(now)
