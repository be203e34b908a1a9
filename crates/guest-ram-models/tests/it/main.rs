//! Runs the models of `guest-ram`, which are next to the code, in `model.rs` of its folders.
//!
//! The schedules are drawn from a fixed seed, so a failure is reproducible. Each model takes one to a few seconds.

#![cfg(test)]

/// A test for each model: its name, and the number of schedules.
macro_rules! models {
    ($folder:ident: $($name:ident $times:literal,)*) => {
        mod $folder {
            use guest_ram_models::model::{$folder, explore};

            $(#[test]
            fn $name() {
                explore($times, $folder::$name);
            })*
        }
    };
}

models! { pager:
    every_fault_is_answered_and_each_page_is_loaded_once 4_000,
    a_discarded_page_is_zero_until_it_is_written 4_000,
    faults_that_meet_discarded_memory_are_answered 4_000,
    an_end_at_any_time_leaves_nobody_waiting_and_no_zeros 4_000,
    an_abandoned_page_stays_poisoned 4_000,
    a_failed_load_is_repeated_and_nobody_waits_forever 4_000,
    every_fault_is_answered_however_pages_and_requests_meet 4_000,
}

models! { copier:
    every_page_is_stored_once_as_it_was_at_the_hold 4_000,
    a_full_queue_delays_writes_and_loses_none 4_000,
    a_page_that_is_discarded_before_the_hold_is_protected_again 4_000,
    a_page_that_is_discarded_after_the_hold_is_in_a_buffer_or_ends_the_copy 4_000,
    a_guest_never_waits_for_the_file 4_000,
    a_page_that_is_not_stored_is_the_reason_of_the_end 4_000,
    an_end_at_any_time_leaves_nobody_waiting 4_000,
}
