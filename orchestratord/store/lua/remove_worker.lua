-- Forgets a worker. Attempts that run there stay running until their owners send them back.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 worker id
-- Returns 1, or 0 when there is no such worker.

pass_when_full()
local worker = worker_hash(ARGV[2])
if not worker then return 0 end
redis.call('DEL', key('worker', ARGV[2]), key('stopping', ARGV[2]))
redis.call('SREM', key('workers'), ARGV[2])
redis.call('SREM', key('workers-of', worker.model), ARGV[2])
redis.call('ZREM', key('worker-leases'), ARGV[2])
redis.call('HDEL', key('drains'), ARGV[2])
bump(worker.model)
fleet(time_ms(ARGV[1]), 'worker_removed', ARGV[2], '')
return 1
