-- A replica begins: nobody who read at its namesake before does so any more.
-- KEYS   1 anchor
-- ARGV   1 now_ms or ''  2 replica
-- Returns nothing
--@include tasks

pass_when_full()
lose_readers(ARGV[2], time_ms(ARGV[1]))
