//! Our source of post-copy and our `receive`, without a QEMU.

use crate::kit::{Program, captured, feed, folder, path, run, stored_memory};

#[test]
fn file_that_is_sent_by_postcopy_is_received_as_it_was() {
    for options in [&["--postcopy-ram"][..], &["--postcopy-ram", "--postcopy-preempt"]] {
        let folder = folder();
        let (from, to) = (captured(&folder, 4 << 20), path(&folder, "machine"));
        let (receive, address) = Program::receive(&["--json"], "tcp:127.0.0.1:0", &to);
        feed(options, &from, &address).done();
        let report = receive.done().json();
        assert_eq!(report["ram"]["normal"], 1024, "{report}");
        assert_eq!(stored_memory(&from), stored_memory(&to));
        let told = run(["inspect".as_ref(), "--json".as_ref(), to.as_os_str()]).json();
        assert_eq!(told["devices"][0]["name"], "timer", "{told}");
        assert_eq!(told["split-by-footers"], true, "{told}");
        // What is received is sent on, by each of the two ways.
        let again = path(&folder, "again");
        let (receive, address) = Program::receive(&[], "tcp:127.0.0.1:0", &again);
        feed(&["--multifd-channels", "2"], &to, &address).done();
        receive.done();
        assert_eq!(stored_memory(&to), stored_memory(&again));
        let told = run(["inspect".as_ref(), "--json".as_ref(), again.as_os_str()]).json();
        assert_eq!(told["split-by-footers"], true, "{told}");
    }
}
