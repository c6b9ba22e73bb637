-- Adds a line to the fleet feed, which keeps about the last 2,000.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 kind  3 subject  4 text
-- Returns the line's position.

pass_when_full()
return fleet(time_ms(ARGV[1]), ARGV[2], ARGV[3], ARGV[4])
