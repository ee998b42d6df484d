"""What a tuning leaves for people and programs: report, plot, settings of servers."""
