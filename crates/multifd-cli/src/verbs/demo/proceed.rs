//! Who lets a migration go on that waits before its switchover.

use std::{io, thread::Builder};

use multifd::live::Control;

use crate::output::outcome::say;

/// Lets the migration go on at the next line, or at the end, of standard input. The thread is not joined: whoever does not
/// press a key holds up no end.
pub(super) fn proceed_at_a_line(control: Control) -> io::Result<()> {
    let wait = move || {
        if control.wait_pre_switchover() {
            say("the guest has been stopped; press Enter to switch over");
            let _ = io::stdin().read_line(&mut String::new());
            // Whether it still waits is its own affair.
            let _ = control.proceed();
        }
    };
    Builder::new().name("continue".into()).spawn(wait).map(drop)
}
