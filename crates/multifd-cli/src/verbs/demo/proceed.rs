//! Continues a migration that waits before its switchover.

use std::{io, thread::Builder};

use multifd::live::Control;

use crate::output::outlet::say;

/// Continues a paused migration at the next line, or at the end, of standard input. The thread is not joined, so a user
/// who does not press a key does not delay the end.
pub(super) fn proceed_at_a_line(control: Control) -> io::Result<()> {
    let wait = move || {
        if control.wait_pre_switchover() {
            say("the guest is stopped; press Enter to switch over");
            let _ = io::stdin().read_line(&mut String::new());
            // If it no longer waits, there is nothing to do.
            let _ = control.proceed();
        }
    };
    Builder::new().name("continue".into()).spawn(wait).map(drop)
}
