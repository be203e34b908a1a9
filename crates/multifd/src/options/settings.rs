//! The options as data (feature `serde`): QEMU's parameter names, its words and units.
//!
//! What comes in is judged here, so that every refusal names its parameter; options that exist are in range.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

use crate::{
    compress::{Levels, Method},
    error::Usage,
    options::parameters::{
        CPU_THROTTLE_INCREMENT, CPU_THROTTLE_INITIAL, DOWNTIME_LIMIT, MAX_CPU_THROTTLE, MULTIFD_CHANNELS,
        Parameter, THROTTLE_TRIGGER_THRESHOLD,
    },
    options::{ChannelCount, MigrateOptions, ReceiveOptions, SendOptions},
    wire::VmUuid,
};

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(crate) struct SendSettings {
    multifd_channels: Number,
    multifd_compression: String,
    uuid: String,
    connect_timeout: Number,
    stall_timeout: Number,
    zero_copy_send: bool,
    /// The level of each method, and all unknown fields.
    #[serde(flatten)]
    levels: BTreeMap<String, Number>,
}

impl Default for SendSettings {
    fn default() -> Self {
        SendOptions::default().into()
    }
}

impl From<SendOptions> for SendSettings {
    fn from(options: SendOptions) -> Self {
        Self {
            multifd_channels: Number(options.channels.into()),
            multifd_compression: options.method.to_string(),
            uuid: options.uuid.to_string(),
            connect_timeout: Number::millis(options.connect_timeout),
            stall_timeout: Number::millis(options.stall_timeout.unwrap_or_default()),
            zero_copy_send: options.zero_copy_send,
            levels: leveled()
                .map(|(method, level)| (level.name.to_owned(), Number(options.levels.of(method).into())))
                .collect(),
        }
    }
}

impl TryFrom<SendSettings> for SendOptions {
    type Error = String;

    fn try_from(settings: SendSettings) -> Result<Self, String> {
        let mut levels = Levels::default();
        for (name, level) in settings.levels {
            let (method, parameter) = leveled()
                .find(|(_, parameter)| parameter.name == name)
                .ok_or_else(|| format!("unknown field `{name}`"))?;
            levels.set(method, level.within(parameter)?);
        }
        let options = Self {
            channels: settings.multifd_channels.within(MULTIFD_CHANNELS)?,
            uuid: uuid(&settings.uuid)?,
            method: method(&settings.multifd_compression)?,
            levels,
            connect_timeout: settings.connect_timeout.duration("connect-timeout")?,
            stall_timeout: limit("stall-timeout", settings.stall_timeout)?,
            zero_copy_send: settings.zero_copy_send,
        };
        options.check().map_err(|error| error.to_string())?;
        Ok(options)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub(crate) struct ReceiveSettings {
    multifd_channels: CountOrWord,
    multifd_compression: String,
    channels_from: String,
    uuid: Option<String>,
    decompression_memory: Number,
    greeting_timeout: Number,
    channels_timeout: Number,
    drain_timeout: Number,
    stall_timeout: Number,
    accept_timeout: Number,
    max_refused: Number,
}

impl Default for ReceiveSettings {
    fn default() -> Self {
        ReceiveOptions::default().into()
    }
}

impl From<ReceiveOptions> for ReceiveSettings {
    fn from(options: ReceiveOptions) -> Self {
        let multifd_channels = match options.channels {
            ChannelCount::Auto => CountOrWord::Word(AUTO.to_owned()),
            ChannelCount::Exact(count) => CountOrWord::Count(Number(count.into())),
        };
        Self {
            multifd_channels,
            multifd_compression: options.method.map_or(AUTO, Method::as_str).to_owned(),
            channels_from: options.channels_from.to_string(),
            uuid: options.uuid.map(|uuid| uuid.to_string()),
            decompression_memory: Number(options.decompression_memory.unwrap_or_default().into()),
            greeting_timeout: Number::millis(options.greeting_timeout),
            channels_timeout: Number::millis(options.channels_timeout),
            drain_timeout: Number::millis(options.drain_timeout),
            stall_timeout: Number::millis(options.stall_timeout.unwrap_or_default()),
            accept_timeout: Number::millis(options.accept_timeout.unwrap_or_default()),
            max_refused: Number(options.max_refused.unwrap_or_default().into()),
        }
    }
}

impl TryFrom<ReceiveSettings> for ReceiveOptions {
    type Error = String;

    fn try_from(settings: ReceiveSettings) -> Result<Self, String> {
        let channels = match settings.multifd_channels {
            CountOrWord::Word(word) if word == AUTO => ChannelCount::Auto,
            CountOrWord::Word(word) => {
                return Err(format!("expected multifd-channels 0 to 255, or auto, found {word:?}"));
            }
            // 0 is multifd off.
            CountOrWord::Count(count) => {
                ChannelCount::Exact(count.within(Parameter { least: 0, ..MULTIFD_CHANNELS })?)
            }
        };
        let method = match settings.multifd_compression.as_str() {
            AUTO => None,
            word => Some(method(word).map_err(|error| error + ", or auto")?),
        };
        Ok(Self {
            channels,
            channels_from: settings.channels_from.parse().map_err(|error: Usage| error.to_string())?,
            uuid: settings.uuid.as_deref().map(uuid).transpose()?,
            method,
            decompression_memory: Some(settings.decompression_memory.any("decompression-memory")?)
                .filter(|bytes| *bytes > 0),
            greeting_timeout: settings.greeting_timeout.duration("greeting-timeout")?,
            channels_timeout: settings.channels_timeout.duration("channels-timeout")?,
            drain_timeout: settings.drain_timeout.duration("drain-timeout")?,
            stall_timeout: limit("stall-timeout", settings.stall_timeout)?,
            accept_timeout: limit("accept-timeout", settings.accept_timeout)?,
            max_refused: Some(settings.max_refused.any("max-refused")?).filter(|most| *most > 0),
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub(crate) struct MigrateSettings {
    max_bandwidth: Number,
    avail_switchover_bandwidth: Number,
    downtime_limit: Number,
    zero_page_detection: String,
    look_for_zero_pages: bool,
    auto_converge: bool,
    cpu_throttle_initial: Number,
    cpu_throttle_increment: Number,
    max_cpu_throttle: Number,
    cpu_throttle_tailslow: bool,
    throttle_trigger_threshold: Number,
    pause_before_switchover: bool,
    max_passes: Number,
    max_total_time: Number,
    switchover_timeout: Option<Number>,
    resume_if_unknown: bool,
    postcopy: String,
}

impl Default for MigrateSettings {
    fn default() -> Self {
        MigrateOptions::default().into()
    }
}

impl From<MigrateOptions> for MigrateSettings {
    fn from(options: MigrateOptions) -> Self {
        let bytes = |bytes: Option<u64>| Number(bytes.unwrap_or_default().into());
        Self {
            max_bandwidth: bytes(options.max_bandwidth),
            avail_switchover_bandwidth: bytes(options.avail_switchover_bandwidth),
            downtime_limit: Number::millis(options.downtime_limit),
            zero_page_detection: options.zero_page_detection.to_string(),
            look_for_zero_pages: options.look_for_zero_pages,
            auto_converge: options.auto_converge,
            cpu_throttle_initial: Number(options.cpu_throttle.initial.into()),
            cpu_throttle_increment: Number(options.cpu_throttle.increment.into()),
            max_cpu_throttle: Number(options.cpu_throttle.max.into()),
            cpu_throttle_tailslow: options.cpu_throttle.tailslow,
            throttle_trigger_threshold: Number(options.cpu_throttle.trigger.into()),
            pause_before_switchover: options.pause_before_switchover,
            max_passes: Number(options.max_passes.unwrap_or_default().into()),
            max_total_time: Number::millis(options.max_total_time.unwrap_or_default()),
            switchover_timeout: options
                .switchover_timeout
                .map(|limit| Number::millis(limit.unwrap_or_default())),
            resume_if_unknown: options.resume_if_unknown,
            postcopy: options.postcopy.to_string(),
        }
    }
}

impl TryFrom<MigrateSettings> for MigrateOptions {
    type Error = String;

    fn try_from(settings: MigrateSettings) -> Result<Self, String> {
        let zero_page_detection =
            settings.zero_page_detection.parse().map_err(|error: Usage| error.to_string())?;
        let max_bandwidth = settings.max_bandwidth.any("max-bandwidth")?;
        let switchover = settings.avail_switchover_bandwidth.any("avail-switchover-bandwidth")?;
        let max_passes = settings.max_passes.any("max-passes")?;
        let max_total_time = settings.max_total_time.duration("max-total-time")?;
        let options = Self::new()
            .max_bandwidth(Some(max_bandwidth))
            .avail_switchover_bandwidth(Some(switchover))
            .downtime_limit(Duration::from_millis(settings.downtime_limit.within(DOWNTIME_LIMIT)?))
            .zero_page_detection(zero_page_detection)
            .look_for_zero_pages(settings.look_for_zero_pages)
            .auto_converge(settings.auto_converge)
            .cpu_throttle_initial(settings.cpu_throttle_initial.within(CPU_THROTTLE_INITIAL)?)
            .cpu_throttle_increment(settings.cpu_throttle_increment.within(CPU_THROTTLE_INCREMENT)?)
            .max_cpu_throttle(settings.max_cpu_throttle.within(MAX_CPU_THROTTLE)?)
            .cpu_throttle_tailslow(settings.cpu_throttle_tailslow)
            .throttle_trigger_threshold(
                settings.throttle_trigger_threshold.within(THROTTLE_TRIGGER_THRESHOLD)?,
            )
            .pause_before_switchover(settings.pause_before_switchover)
            .max_passes(Some(max_passes))
            .max_total_time(Some(max_total_time))
            .resume_if_unknown(settings.resume_if_unknown)
            .postcopy(settings.postcopy.parse().map_err(|error: Usage| error.to_string())?);
        let options = match settings.switchover_timeout {
            None => options,
            Some(limit) => {
                let limit = limit.duration("switchover-timeout")?;
                options.switchover_timeout(Some(limit).filter(|limit| !limit.is_zero()))
            }
        };
        options.check().map_err(|error| error.to_string())?;
        Ok(options)
    }
}

/// A number of any size, so that what is outside a range gets as far as its name is known.
#[derive(Clone, Copy)]
struct Number(i128);

impl Number {
    fn millis(time: Duration) -> Self {
        Self(u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into())
    }

    fn within<T: TryFrom<i128>>(self, range: Parameter) -> Result<T, String> {
        range.check(self.0).map_err(|error| error.to_string())?;
        T::try_from(self.0).map_err(|_| format!("{} {} is too great", range.name, self.0))
    }

    fn any(self, name: &'static str) -> Result<u64, String> {
        self.within(Parameter::new(name, 0, u64::MAX, 0))
    }

    fn duration(self, name: &'static str) -> Result<Duration, String> {
        self.any(name).map(Duration::from_millis)
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(self.0).map_err(ser::Error::custom)?)
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Number;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a whole number")
            }

            fn visit_u64<E>(self, found: u64) -> Result<Number, E> {
                Ok(Number(found.into()))
            }

            fn visit_i64<E>(self, found: i64) -> Result<Number, E> {
                Ok(Number(found.into()))
            }
        }
        deserializer.deserialize_u64(Visitor)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum CountOrWord {
    Count(Number),
    Word(String),
}

/// The methods that have a level.
fn leveled() -> impl Iterator<Item = (Method, Parameter)> {
    Method::ALL.iter().filter_map(|method| Some((*method, method.level()?.parameter)))
}

fn method(text: &str) -> Result<Method, String> {
    text.parse().map_err(|error: Usage| error.to_string())
}

/// 0 is none.
fn limit(name: &'static str, time: Number) -> Result<Option<Duration>, String> {
    time.duration(name).map(|limit| Some(limit).filter(|limit| !limit.is_zero()))
}

fn uuid(text: &str) -> Result<VmUuid, String> {
    text.parse().map_err(|error| format!("uuid: {error}"))
}

const AUTO: &str = "auto";
