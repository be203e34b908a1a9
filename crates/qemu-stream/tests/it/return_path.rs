//! The end of a migration: the destination's messages, and the source's result.

use std::{
    io::{Read, Write},
    thread,
    time::{Duration, Instant},
};

use qemu_stream::{
    error::{Error, Usage},
    format::Message,
    incoming::{Incoming, Outcome},
    outgoing::{Options, Outgoing},
};

use crate::kit::{Memory, Tape, cause, complete, pair, q35, send, stream};

/// The result of a source that has sent everything, for `answer` and the connection's end.
fn complete_with(answer: &[u8]) -> Result<(), multifd::Error> {
    let tape = Tape::playing(answer);
    let mut out = Outgoing::new(tape, Options::new(q35("10.0"))).unwrap();
    send(&mut out, true).unwrap();
    complete(&mut out, None)
}

/// The message that a destination of this library sends first: it never closes without SHUT.
const VERDICT: Message = Message::Pong(0x6d66_6501);
/// The reply to the PING of a source that understands a reason.
const REASON: Message = Message::Pong(0x6d66_6701);

fn said(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut bytes));
    bytes
}

#[test]
fn the_source_completes_when_the_destination_has_loaded() {
    complete_with(&said(&[Message::Pong(1), Message::SwitchoverAck, Message::Shut(0)])).unwrap();
}

#[test]
fn a_destination_that_failed_leaves_the_guest_at_the_source() {
    let error = complete_with(&said(&[Message::Pong(1), Message::Shut(1)])).unwrap_err();
    assert!(matches!(cause(&error), Error::DestinationFailed { code: 1, .. }));
}

/// The text is shown without what a terminal would execute, and decides nothing.
#[test]
fn a_source_shows_why_its_destination_has_failed() {
    let reason = Message::Reason("the disk is\u{1b}[2J missing".into());
    let error = complete_with(&said(&[Message::Pong(1), reason.clone(), Message::Shut(1)])).unwrap_err();
    let shown =
        r#"the destination refused: "the disk is\u{1b}[2J missing" (SHUT 1); it does not have the guest"#;
    assert_eq!(cause(&error).to_string(), shown);
    complete_with(&said(&[reason, Message::Shut(0)])).unwrap();
}

/// A QEMU does not know the message.
#[test]
fn a_source_that_did_not_ask_gets_no_reason() {
    let asks = [&[8, 0, 2, 0, 4][..], &0x6d66_6701_u32.to_be_bytes()].concat();
    let with = stream(Options::new(q35("10.0")));
    let at = with.windows(asks.len()).position(|window| window == asks).unwrap();
    let without = [&with[..at], &with[at + asks.len()..]].concat();
    for (bytes, asked, sends) in [(&with, true, true), (&with, true, false), (&without, false, true)] {
        let mut incoming = Incoming::new(Tape::playing(bytes)).send_reason(sends);
        incoming.run(&mut Memory::default()).unwrap();
        incoming.set_reason(&std::io::Error::other("no space"));
        let output = incoming.finish(Outcome::Failed).unwrap().output;
        let reasons = if asked && sends { vec![Message::Reason("no space".into())] } else { Vec::new() };
        assert!(output.ends_with(&said(&[&reasons[..], &[Message::Shut(1)]].concat())));
        assert_eq!(output.windows(8).any(|text| text == b"no space"), asked && sends);
    }
}

#[test]
fn a_destination_that_leaves_without_shut_leaves_the_guest_at_the_source() {
    let error = complete_with(&said(&[Message::Pong(1)])).unwrap_err();
    assert!(matches!(cause(&error), Error::NoShut { .. }));
    assert!(cause(&error).to_string().contains("so it does not have the guest"), "{error}");
    let cut = complete_with(&[0, 1, 0]).unwrap_err();
    assert!(matches!(cause(&cut), Error::NoShut { .. }));
}

#[test]
fn messages_that_have_no_place_in_precopy_are_refused() {
    let request = Message::ReqPages { block: None, start: 0, length: 0x1000 };
    let error = complete_with(&said(&[request])).unwrap_err();
    assert!(cause(&error).to_string().contains("postcopy-ram"), "{error}");
    let odd = complete_with(&[0, 9, 0, 0]).unwrap_err();
    assert!(matches!(cause(&odd), Error::Malformed { .. }));
}

#[test]
fn without_a_return_path_nothing_is_waited_for_and_nothing_said() {
    let mut out = Outgoing::new(Tape::default(), Options::new(q35("10.0")).unconfirmed()).unwrap();
    send(&mut out, true).unwrap();
    complete(&mut out, None).unwrap();
    let mut incoming = Incoming::new(Tape::playing(&out.into_inner().output));
    incoming.run(&mut Memory::default()).unwrap();
    assert!(incoming.finish(Outcome::Loaded).unwrap().output.is_empty());
}

#[test]
fn pong_and_shut_are_what_the_destination_says() {
    for (outcome, code) in [(Outcome::Loaded, 0), (Outcome::Failed, 1)] {
        let mut incoming = Incoming::new(Tape::playing(&stream(Options::new(q35("10.0")))));
        incoming.run(&mut Memory::default()).unwrap();
        let tape = incoming.finish(outcome).unwrap();
        assert_eq!(
            tape.output,
            said(&[Message::Pong(1), REASON, Message::Pong(0x6d66_6402), VERDICT, Message::Shut(code)])
        );
    }
}

#[test]
fn switchover_ack_is_said_when_asked_for() {
    let mut incoming = Incoming::new(Tape::playing(&stream(Options::new(q35("10.0"))))).switchover_ack(true);
    incoming.run(&mut Memory::default()).unwrap();
    let tape = incoming.finish(Outcome::Loaded).unwrap();
    let pongs = [Message::Pong(1), REASON, Message::Pong(0x6d66_6402), VERDICT];
    assert_eq!(tape.output, said(&[&[Message::SwitchoverAck], &pongs[..], &[Message::Shut(0)]].concat()));
}

#[test]
fn loaded_cannot_be_said_before_it_is() {
    let mut bytes = stream(Options::new(q35("10.0")));
    bytes.pop();
    let mut incoming = Incoming::new(Tape::playing(&bytes));
    assert!(incoming.run(&mut Memory::default()).is_err());
    let refused = incoming.finish(Outcome::Loaded);
    assert!(matches!(refused, Err(Error::Usage(Usage::OutOfOrder { .. }))));
}

#[test]
fn a_destination_that_says_nothing_is_left_at_the_deadline() {
    let (source, mut destination) = pair();
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        destination.read_to_end(&mut bytes).map(|_| bytes.len())
    });
    let mut out = Outgoing::new(source, Options::new(q35("10.0"))).unwrap();
    send(&mut out, true).unwrap();
    let began = Instant::now();
    let error = complete(&mut out, Some(Duration::from_millis(50))).unwrap_err();
    assert!(matches!(cause(&error), Error::TimedOut { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
    out.into_inner().close_write().unwrap();
    reader.join().unwrap().unwrap();
}

/// A byte from time to time must not postpone the deadline.
#[test]
fn a_destination_that_dribbles_is_left_at_the_deadline() {
    let (source, mut destination) = pair();
    let waker = destination.waker();
    let dribble = thread::spawn(move || {
        let pongs = said(&[Message::Pong(1)]);
        while pongs.iter().all(|byte| destination.write_all(&[*byte]).is_ok()) {
            thread::sleep(Duration::from_millis(1));
        }
    });
    let mut out = Outgoing::new(source, Options::new(q35("10.0"))).unwrap();
    send(&mut out, true).unwrap();
    let error = complete(&mut out, Some(Duration::from_millis(50))).unwrap_err();
    assert!(matches!(cause(&error), Error::TimedOut { .. }), "{error}");
    waker.wake();
    dribble.join().unwrap();
}

#[test]
fn a_wait_for_shut_ends_when_the_connection_is_shut_down() {
    let (source, destination) = pair();
    let waker = source.waker();
    let mut out = Outgoing::new(source, Options::new(q35("10.0"))).unwrap();
    send(&mut out, true).unwrap();
    let waiting = thread::spawn(move || complete(&mut out, None));
    waker.wake();
    assert!(waiting.join().unwrap().is_err());
    drop(destination);
}

/// The system only reports that the connection broke; the destination has sent the reason.
#[test]
fn the_last_word_of_a_destination_explains_a_failed_write() {
    struct Broken(Tape);
    impl Read for Broken {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(into)
        }
    }
    impl Write for Broken {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0.output.len() > 100 {
                Err(std::io::ErrorKind::BrokenPipe.into())
            } else {
                self.0.write(bytes)
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    impl qemu_stream::Connection for Broken {
        fn waker(&self) -> Option<std::sync::Arc<dyn multifd::channel::Wake>> {
            None
        }
        fn write_waker(&self) -> Option<std::sync::Arc<dyn multifd::channel::Wake>> {
            None
        }
        fn set_read_timeout(&mut self, _: Option<Duration>) -> std::io::Result<()> {
            Ok(())
        }
    }
    for (answer, explained) in [(said(&[Message::Pong(1), Message::Shut(1)]), true), (Vec::new(), false)] {
        let mut out = Outgoing::new(Broken(Tape::playing(&answer)), Options::new(q35("10.0"))).unwrap();
        let error = send(&mut out, true).unwrap_err();
        assert_eq!(matches!(error, Error::DestinationFailed { code: 1, .. }), explained, "{error}");
        // A close without a message is reported as such, with a hint.
        assert_eq!(matches!(error, Error::NoShut { .. }), !explained, "{error}");
        assert!(matches!(out.switchover(), Err(Error::Usage(_))));
    }
}
