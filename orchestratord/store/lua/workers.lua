-- Reads workers.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 worker id or '' for all
-- Returns a list of worker views.
--@include workers

local now = time_ms(ARGV[1])
local result = {}
for _, id in ipairs(ARGV[2] ~= '' and { ARGV[2] } or redis.call('SMEMBERS', key('workers'))) do
  local worker = worker_hash(id)
  if worker then result[#result + 1] = worker_view(worker, now) end
end
return result
