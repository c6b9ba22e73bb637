-- Ends a task with what its worker said.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 call id  3 task id  4 attempt  5 state (completed|failed|cancelled)  6 end|error
--        7 event (JSON)  8 tokens in, 0 if unknown  9 cached tokens  10 measure the service (1|0)
--        11 tokens that the log must hold
-- Returns 1 when this call ended it; 0 when the attempt is not the running one, and nothing changed; -1 - n when the
--        log holds only n tokens (a failover undid the rest), and nothing changed.
-- Event  <attempt>-<max> end or error
--@include tasks

pass_when_full()
local now = time_ms(ARGV[1])
local call = ARGV[2]
local task = task_hash(ARGV[3])
if not task or task.attempt ~= ARGV[4] then return 0 end
if task.state ~= 'running' then return task.last_call == call and 1 or 0 end
if tonumber(task.tokens_logged) < tonumber(ARGV[11]) then return -1 - tonumber(task.tokens_logged) end

-- Exponentially weighted mean and variance (West, "Updating mean and variance estimates", 1979): the first samples
-- count equally, later ones with a weight of a tenth.
local function measure()
  local name = key('rates', task.model)
  local rates = hash(name) or {}
  local samples = tonumber(rates.samples or 0)
  local weight = math.max(0.1, 1 / (samples + 1))
  local generated = tonumber(task.tokens_logged) - tonumber(task.tokens_kept)
  local service = now - tonumber(task.claimed_at_ms)
  local function blend(field, value)
    local mean, variance = tonumber(rates[field] or 0), tonumber(rates[field .. '_variance'] or 0)
    local delta = value - mean
    redis.call('HSET', name, field, exact(mean + weight * delta),
      field .. '_variance', exact((1 - weight) * (variance + weight * delta * delta)))
  end
  blend('service_ms', service)
  blend('tokens_out', generated)
  if generated > 0 then blend('ms_per_token', service / generated) end
  redis.call('HSET', name, 'samples', integer(samples + 1), 'updated_at_ms', integer(now))
end

free_slot(task)
if ARGV[8] ~= '0' then update(task, { tokens_in = ARGV[8] }) end
update(task, { cached_tokens = ARGV[9] })
if ARGV[10] == '1' then measure() end
finish(task, now, ARGV[5], ARGV[6], ARGV[7], call)
bump(task.model)
hint('queue')
return 1
