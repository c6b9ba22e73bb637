-- A worker's standing.

local function slots_used(worker_id)
  return redis.call('HLEN', key('running', worker_id)) + redis.call('HLEN', key('stopping', worker_id))
end

local function is_draining(worker)
  return worker.status == 'draining' or redis.call('HEXISTS', key('drains'), worker.worker_id) == 1
end

local function worker_state(worker, now)
  if worker.lost == '1' or tonumber(worker.lease_expires_at_ms) <= now then return 'lost' end
  if worker.status ~= 'ready' and worker.status ~= 'draining' then return 'failed' end
  if is_draining(worker) then return 'draining' end
  return 'ready'
end

-- { fields..., slots_used, state, drain deadline or false }
local function worker_view(worker, now)
  local view = pick(worker, WORKER_FIELDS)
  view[#view + 1] = slots_used(worker.worker_id)
  view[#view + 1] = worker_state(worker, now)
  view[#view + 1] = redis.call('HGET', key('drains'), worker.worker_id)
  return view
end

local function lose(worker, now, reason)
  redis.call('ZREM', key('worker-leases'), worker.worker_id)
  redis.call('DEL', key('stopping', worker.worker_id))
  redis.call('HSET', key('worker', worker.worker_id), 'lost', '1')
  bump(worker.model)
  fleet(now, 'worker_lost', worker.worker_id, reason)
end
