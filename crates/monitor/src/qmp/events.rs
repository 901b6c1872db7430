//! The events that may be sent, for introspection.

use super::Empty;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A row.
pub struct Event {
    /// QMP's name.
    pub name: &'static str,
    pub(super) data: fn(&mut SchemaGenerator) -> Schema,
}

const fn event<T: JsonSchema>(name: &'static str) -> Event {
    Event { name, data: |g| g.subschema_for::<T>() }
}

/// All events.
pub const EVENTS: &[Event] = &[
    event::<Empty>("STOP"),
    event::<Empty>("RESUME"),
    event::<ByCause>("RESET"),
    event::<ByCause>("SHUTDOWN"),
    event::<Empty>("POWERDOWN"),
    event::<Empty>("SUSPEND"),
    event::<Empty>("WAKEUP"),
    event::<GuestPanicked>("GUEST_PANICKED"),
    event::<ByAction>("WATCHDOG"),
    event::<DeviceDeleted>("DEVICE_DELETED"),
    event::<BalloonChange>("BALLOON_CHANGE"),
    event::<RtcChange>("RTC_CHANGE"),
    event::<NicFilter>("NIC_RX_FILTER_CHANGED"),
    event::<TrayMoved>("DEVICE_TRAY_MOVED"),
    event::<BlockIoError>("BLOCK_IO_ERROR"),
    event::<PortChange>("VSERPORT_CHANGE"),
    event::<VncBasic>("VNC_CONNECTED"),
    event::<VncBasic>("VNC_INITIALIZED"),
    event::<VncBasic>("VNC_DISCONNECTED"),
    event::<DumpCompleted>("DUMP_COMPLETED"),
];

/// Why.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct ByCause {
    /// Whether the guest did it.
    pub guest: bool,
    /// What did it.
    pub reason: machine::Cause,
}

/// Data of `GUEST_PANICKED`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct GuestPanicked {
    /// What was done: `pause`, `poweroff`, `run`.
    pub action: String,
}

/// Data of `WATCHDOG`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct ByAction {
    /// What was done.
    pub action: machine::control::WatchdogAction,
}

/// Data of `DEVICE_DELETED`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct DeviceDeleted {
    /// Its id.
    pub device: Option<String>,
    /// Its path.
    pub path: String,
}

/// Data of `BALLOON_CHANGE`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct BalloonChange {
    /// RAM that the guest has, in bytes.
    pub actual: u64,
}

/// Data of `RTC_CHANGE`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RtcChange {
    /// Seconds from the host's clock.
    pub offset: i64,
    /// The device.
    pub qom_path: String,
}

/// Data of `NIC_RX_FILTER_CHANGED`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct NicFilter {
    /// Id of the device.
    pub name: Option<String>,
    /// Its path.
    pub path: String,
}

/// Data of `DEVICE_TRAY_MOVED`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct TrayMoved {
    /// Name of the back end.
    pub device: String,
    /// Id of the drive.
    pub id: String,
    /// Whether it is open now.
    pub tray_open: bool,
}

/// Data of `BLOCK_IO_ERROR`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockIoError {
    /// Name of the back end.
    pub device: String,
    /// Name of the node.
    pub node_name: Option<String>,
    /// `read` or `write`.
    pub operation: String,
    /// What was done: `ignore`, `report`, `stop`.
    pub action: String,
    /// Whether the image is full.
    pub nospace: Option<bool>,
    /// The host's reason.
    pub reason: String,
}

/// Data of `VSERPORT_CHANGE`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct PortChange {
    /// Id of the port.
    pub id: String,
    /// Whether the guest has it open.
    pub open: bool,
}

/// Data of the events about VNC clients.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct VncBasic {
    /// The server's address.
    pub server: Value,
    /// The client's address.
    pub client: Value,
}

/// Data of `DUMP_COMPLETED`.
#[derive(Serialize, Deserialize, JsonSchema)]
pub struct DumpCompleted {
    /// How it went.
    pub result: Value,
    /// What went wrong.
    pub error: Option<String>,
}
