-- A worker says what it is. A new instance at a known id replaces the old one, whose attempts are found gone by their
-- owners; what was being stopped there has stopped. An order to drain stays.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 lease in ms  3… field, value pairs of the worker hash
-- Returns nothing.
--@include workers

pass_when_full()
local now = time_ms(ARGV[1])
local flat, worker = {}, {}
for i = 3, #ARGV do flat[#flat + 1] = ARGV[i] end
for i = 1, #flat, 2 do worker[flat[i]] = flat[i + 1] end
local id = worker.worker_id
local before = worker_hash(id)
if before and before.model ~= worker.model then
  redis.call('SREM', key('workers-of', before.model), id)
  bump(before.model)
end
if not before or before.instance_id ~= worker.instance_id then
  redis.call('DEL', key('stopping', id))
  fleet(now, 'worker_registered', id, worker.model .. ' in pool ' .. worker.pool)
end
redis.call('DEL', key('worker', id))
redis.call('HSET', key('worker', id), unpack(flat))
redis.call('HSET', key('worker', id), 'status', 'ready', 'lost', '0', 'registered_at_ms', integer(now),
  'lease_ms', ARGV[2], 'lease_expires_at_ms', integer(now + tonumber(ARGV[2])))
redis.call('ZADD', key('worker-leases'), integer(now + tonumber(ARGV[2])), id)
redis.call('SADD', key('workers'), id)
redis.call('SADD', key('workers-of', worker.model), id)
redis.call('SADD', key('models'), worker.model)
bump(worker.model)
hint('queue')
