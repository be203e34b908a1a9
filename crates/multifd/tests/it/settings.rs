//! The options as data: written options are read back, and invalid ones are refused by name.

use std::time::Duration;

use multifd::{
    ChannelCount, Method, ReceiveOptions, SendOptions,
    live::{MigrateOptions, PostcopyWhen, ZeroPageDetection},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

#[track_caller]
fn assert_reads_back<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(options: &T) {
    let text = serde_json::to_string(options).expect("written");
    assert_eq!(serde_json::from_str::<T>(&text).expect(&text), *options, "{text}");
}

#[track_caller]
fn assert_refused<T: DeserializeOwned + std::fmt::Debug>(text: &str, told: &str) {
    let refused = serde_json::from_str::<T>(text).expect_err(text).to_string();
    assert!(refused.starts_with(told), "expected {told:?}, found {refused:?}");
}

#[test]
fn options_read_back_as_written() {
    assert_reads_back(&SendOptions::new());
    assert_reads_back(&SendOptions::new().zero_copy_send(true));
    assert_reads_back(&ReceiveOptions::new());
    assert_reads_back(&MigrateOptions::new());
    let uuid = "00112233-4455-6677-8899-aabbccddeeff".parse().expect("a UUID");
    for method in Method::ALL.iter().copied() {
        let send = SendOptions::new().channels(255).uuid(uuid).method(method).level(method, 9);
        assert_reads_back(&send.connect_timeout(Duration::from_millis(1)));
        let receive =
            ReceiveOptions::new().channels(ChannelCount::Exact(0)).uuid(Some(uuid)).method(Some(method));
        assert_reads_back(
            &receive
                .greeting_timeout(Duration::from_millis(7))
                .drain_timeout(Duration::ZERO)
                .stall_timeout(None),
        );
    }
    for when in
        [PostcopyWhen::Stall, PostcopyWhen::Passes(3), PostcopyWhen::After(Duration::from_millis(1500))]
    {
        assert_reads_back(&MigrateOptions::new().postcopy(when));
    }
    for detection in [ZeroPageDetection::None, ZeroPageDetection::Legacy, ZeroPageDetection::Multifd] {
        let options = MigrateOptions::new().zero_page_detection(detection).look_for_zero_pages(false);
        let options = options.max_bandwidth(Some(u64::MAX)).avail_switchover_bandwidth(Some(1));
        assert_reads_back(&options.downtime_limit(Duration::from_secs(2000)));
    }
}

#[test]
fn what_is_missing_has_its_default() {
    assert_eq!(serde_json::from_str::<SendOptions>("{}").expect("defaults"), SendOptions::new());
    assert_eq!(serde_json::from_str::<ReceiveOptions>("{}").expect("defaults"), ReceiveOptions::new());
    assert_eq!(serde_json::from_str::<MigrateOptions>("{}").expect("defaults"), MigrateOptions::new());
}

#[test]
fn options_have_the_names_of_the_parameters() {
    let send = serde_json::to_value(SendOptions::new()).expect("written");
    let expected = json!({
        "multifd-channels": 2, "multifd-compression": "none", "multifd-zlib-level": 1, "multifd-zstd-level": 1,
        "uuid": "00000000-0000-0000-0000-000000000000", "connect-timeout": 30000, "stall-timeout": 120000,
        "zero-copy-send": false,
    });
    assert_eq!(send, expected);
    let migrate = serde_json::to_value(MigrateOptions::new()).expect("written");
    let expected = json!({
        "max-bandwidth": 0, "avail-switchover-bandwidth": 0, "downtime-limit": 300,
        "zero-page-detection": "legacy", "look-for-zero-pages": true,
        "auto-converge": false, "cpu-throttle-initial": 20, "cpu-throttle-increment": 10, "max-cpu-throttle": 99,
        "cpu-throttle-tailslow": false, "throttle-trigger-threshold": 50, "pause-before-switchover": false,
        "max-passes": 0, "max-total-time": 0, "switchover-timeout": null, "resume-if-unknown": false,
        "postcopy": "never",
    });
    assert_eq!(migrate, expected);
}

#[test]
fn value_outside_its_range_is_refused_with_the_name() {
    for found in ["0", "256", "-1"] {
        let text = format!(r#"{{"multifd-channels": {found}}}"#);
        assert_refused::<SendOptions>(&text, &format!("expected multifd-channels 1 to 255, found {found}"));
    }
    for found in ["10", "-1", "18446744073709551615"] {
        let text = format!(r#"{{"multifd-zlib-level": {found}}}"#);
        assert_refused::<SendOptions>(&text, &format!("expected multifd-zlib-level 0 to 9, found {found}"));
    }
    let told = "expected multifd-zstd-level 0 to 20, found 21";
    assert_refused::<SendOptions>(r#"{"multifd-zstd-level": 21}"#, told);
    assert_refused::<SendOptions>(r#"{"multifd-compression": "qpl"}"#, "expected multifd-compression none");
    assert_refused::<SendOptions>(r#"{"connect-timeout": -1}"#, "expected connect-timeout 0 to ");
    assert_refused::<SendOptions>(r#"{"uuid": "1"}"#, "uuid: ");
    let told = "expected multifd-channels 0 to 255, found 256";
    assert_refused::<ReceiveOptions>(r#"{"multifd-channels": 256}"#, told);
    assert_refused::<ReceiveOptions>(
        r#"{"multifd-channels": "many"}"#,
        "expected multifd-channels 0 to 255, or auto",
    );
    assert_refused::<ReceiveOptions>(r#"{"multifd-compression": "x"}"#, "expected multifd-compression none");
    let told = "expected downtime-limit 0 to 2000000, found 2000001";
    assert_refused::<MigrateOptions>(r#"{"downtime-limit": 2000001}"#, told);
    assert_refused::<MigrateOptions>(r#"{"max-bandwidth": -1}"#, "expected max-bandwidth 0 to ");
    let told = "expected avail-switchover-bandwidth 0 to ";
    assert_refused::<MigrateOptions>(r#"{"avail-switchover-bandwidth": -1}"#, told);
    assert_refused::<MigrateOptions>(r#"{"zero-page-detection": "x"}"#, "expected zero-page-detection none");
    let told = "expected cpu-throttle-initial 1 to 99, found 300";
    assert_refused::<MigrateOptions>(r#"{"cpu-throttle-initial": 300}"#, told);
    let told = "expected max-cpu-throttle 50 to 99, found 49";
    assert_refused::<MigrateOptions>(r#"{"cpu-throttle-initial": 50, "max-cpu-throttle": 49}"#, told);
}

#[test]
fn unknown_field_is_refused() {
    assert_refused::<SendOptions>(r#"{"channels": 2}"#, "unknown field `channels`");
    assert_refused::<ReceiveOptions>(r#"{"multifd_channels": 2}"#, "unknown field `multifd_channels`");
    assert_refused::<MigrateOptions>(r#"{"auto_converge": true}"#, "unknown field `auto_converge`");
}
