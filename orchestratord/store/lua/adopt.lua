-- Gives this replica running attempts that have no living owner: handed over, or owned by a replica whose lease ended.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 replica  3 limit  4 ms for which Redis has been reachable  5 latest believable now or ''
-- Returns { now_ms, believable 1|0, list of running task fields }
-- The readers of a replica whose lease ended are gone too: what they alone attended becomes unattended.
-- A lease is judged only after Redis has been reachable for as long as it lasts, and only by a call that came in time.
--@include tasks

pass_when_full()
local now = time_ms(ARGV[1])
local replica, room, healthy = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local believable = ARGV[5] == '' or now <= tonumber(ARGV[5])
local result = {}

local function take(task_id)
  local task = task_hash(task_id)
  if not task or task.state ~= 'running' then return end
  task.owner = replica
  own(task_id, replica, now)
  redis.call('HSET', key('task', task_id), 'owner', replica)
  result[#result + 1] = pick(task, RUNNING_FIELDS)
  room = room - 1
end

if room > 0 then
  for _, task_id in ipairs(redis.call('SPOP', key('orphans'), room)) do take(task_id) end
end
if believable then
  for _, dead in ipairs(redis.call('ZRANGEBYSCORE', key('replicas'), '-inf', integer(now), 'LIMIT', 0, 32)) do
    local lease = tonumber(redis.call('HGET', key('replica-leases'), dead) or '0')
    if dead ~= replica and healthy >= lease then
      local before = #result
      lose_readers(dead, now)
      if room > 0 then
        for _, task_id in ipairs(redis.call('SPOP', key('owned', dead), room)) do take(task_id) end
      end
      if redis.call('EXISTS', key('owned', dead)) == 0 then
        redis.call('ZREM', key('replicas'), dead)
        redis.call('HDEL', key('replica-leases'), dead)
        if redis.call('HDEL', key('replica-urls'), dead) == 1 then fleet(now, 'replica_lost', dead, 'its lease ended') end
      end
      if #result > before then
        fleet(now, 'tasks_adopted', replica, (#result - before) .. ' tasks of ' .. dead)
      end
    end
  end
end
return { integer(now), believable and 1 or 0, result }
