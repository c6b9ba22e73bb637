-- A page of a tenant's tasks, newest first.
-- KEYS   1 anchor
-- ARGV   1 tenant  2 model or ''  3 limit  4 sequence before which the page starts, or '+inf'  5… statuses
-- Returns a list of { task fields (RECORD_FIELDS), position }
--@include tasks

local limit = tonumber(ARGV[3])
local found = {}
for i = 5, #ARGV do
  local name = ARGV[2] == '' and key('tasks-by', ARGV[1], ARGV[i]) or key('tasks-by', ARGV[1], ARGV[i], ARGV[2])
  local before = ARGV[4] == '+inf' and '+inf' or '(' .. ARGV[4]
  local page = redis.call('ZREVRANGEBYSCORE', name, before, '-inf', 'WITHSCORES', 'LIMIT', 0, limit)
  for j = 1, #page, 2 do found[#found + 1] = { page[j], tonumber(page[j + 1]) } end
end
table.sort(found, function(left, right) return left[2] > right[2] end)
local result = {}
for i = 1, math.min(limit, #found) do
  local task = task_hash(found[i][1])
  if task then result[#result + 1] = { pick(task, RECORD_FIELDS), position(task) } end
end
return result
