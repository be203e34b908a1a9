//! Runs the models of the engine, which are next to the code, in `model.rs` of its folders.
//!
//! The schedules are drawn from a fixed seed, so a failure is reproducible. Each model runs so often that it takes one
//! to a few seconds.

#![cfg(test)]

/// A test for each model: its name, and the number of schedules.
macro_rules! models {
    ($folder:ident: $($name:ident $times:literal,)*) => {
        mod $folder {
            use multifd_models::model::{self, explore};

            $(#[test]
            fn $name() {
                explore($times, model::$folder::$name);
            })*
        }
    };
}

models! { stop:
    the_first_error_wins_and_a_watcher_is_woken_once_however_late_it_comes 4_000,
    whoever_sees_the_flag_finds_the_cause 4_000,
    of_a_good_end_and_a_cancel_one_wins_and_only_a_failure_shuts_connections_down 4_000,
    a_pause_ends_with_the_stop 4_000,
    a_pause_ends_by_its_time_or_with_the_stop 4_000,
    guards_may_go_while_the_stop_wakes 4_000,
    whoever_waits_for_room_or_for_bytes_is_woken 4_000,
    a_wait_for_room_ends_when_nothing_has_moved_for_so_long_and_not_before 4_000,
}

models! { dispatch:
    every_batch_is_carried_once_before_its_sync_point_and_comes_back 4_000,
    a_collector_is_woken_for_each_empty_batch_while_channels_keep_the_others 4_000,
    a_batch_from_after_the_sync_point_waits_for_its_channels_sync 4_000,
    a_channel_that_breaks_ends_every_wait_of_the_others 4_000,
    a_connect_that_fails_ends_the_wait_for_the_channels 4_000,
    what_a_lost_channel_was_given_is_sent_again_after_the_sync_point 4_000,
}

models! { switchover:
    a_pause_before_the_switchover_ends_when_told_or_with_the_stop 4_000,
    whoever_waits_for_a_pause_is_told_that_there_is_none 4_000,
    a_pause_that_is_told_to_go_on_goes_on 4_000,
    whoever_sees_the_pause_can_end_it 4_000,
    whatever_is_cut_at_the_end_there_are_never_two_owners 4_000,
    without_a_cut_both_sides_know_who_has_the_guest 4_000,
}

models! { recv:
    an_older_page_is_never_placed_over_a_newer_one 4_000,
    a_channel_that_has_ended_fails_the_sync_that_waits_for_it 4_000,
    a_channel_that_breaks_is_lost_and_its_pages_come_before_the_sync_point 4_000,
    a_channel_that_the_source_has_lost_is_shut_down_before_the_sync_point 4_000,
    main_counts_every_channel_that_was_connected_before_its_first_record 4_000,
    a_cancel_ends_acceptor_greetings_main_and_channels 4_000,
    a_source_that_dies_before_main_leaves_its_places_free 4_000,
    a_channel_that_comes_late_is_counted_or_fails_the_migration 4_000,
    no_page_is_written_behind_the_seal 4_000,
    the_end_waits_for_every_channel_to_close 4_000,
    channels_that_a_source_leaves_open_are_closed_from_here 4_000,
    a_channel_that_main_never_joins_at_a_sync_point_gives_up 4_000,
    a_sync_without_all_its_channels_gives_up 4_000,
    a_sync_whose_channel_sends_nothing_gives_up 4_000,
}

/// Small enough for every possible schedule.
#[test]
fn the_seal_meets_the_mark_in_every_order() {
    let schedules = multifd_models::model::exhaust(multifd_models::model::recv::the_seal_meets_the_mark);
    println!("{schedules} schedules");
    assert!(schedules > 100);
}

models! { loopback:
    what_the_source_has_synced_the_destination_has 1_000,
    the_destination_learns_the_number_of_channels 1_000,
    a_cancel_at_the_source_ends_both_sides 1_000,
    a_cancel_at_the_destination_ends_both_sides 1_000,
}

models! { postcopy:
    each_page_is_sent_once_and_a_drained_schedule_has_sent_all 20_000,
    requests_on_the_connection_of_the_walk_are_sent_once 20_000,
    a_request_outlives_a_break_and_the_walk_after_it_ends 20_000,
    closing_ends_every_wait 20_000,
}
