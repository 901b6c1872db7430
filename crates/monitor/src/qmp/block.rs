//! Disk images and drives.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use base::props::Bag;
use machine::BlockNode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub(super) const COMMANDS: &[Command] = &[
    command!("query-block", query_block),
    command!("query-named-block-nodes", query_nodes),
    command!("query-block-jobs", query_block_jobs),
    command!("query-jobs", query_jobs),
    command!("blockdev-add", add),
    command!("blockdev-del", del),
    command!("blockdev-open-tray", open_tray),
    command!("blockdev-close-tray", close_tray),
    command!("blockdev-remove-medium", remove_medium),
    command!("blockdev-insert-medium", insert_medium),
    command!("blockdev-change-medium", change_medium),
    command!("eject", eject),
    command!("block_resize", resize),
];

/// An image file.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    filename: String,
    format: String,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    dirty_flag: bool,
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct CacheInfo {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

/// A node.
#[derive(Serialize, JsonSchema)]
struct NodeInfo {
    file: String,
    #[serde(rename = "node-name")]
    node_name: String,
    ro: bool,
    drv: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<String>,
    backing_file_depth: u64,
    encrypted: bool,
    detect_zeroes: &'static str,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    image: ImageInfo,
    cache: CacheInfo,
    write_threshold: u64,
}

fn node_info(node: &BlockNode) -> NodeInfo {
    let image = &node.image;
    let info = image.info().ok();
    let backing = image.backing().map(|b| b.name().to_owned());
    let mut depth = 0;
    let mut below = image.backing();
    while let Some(b) = below {
        depth += 1;
        below = b.backing();
    }
    NodeInfo {
        file: image.name().into(),
        node_name: node.name.clone(),
        ro: image.is_read_only(),
        drv: image.driver().name.into(),
        backing_file: backing.clone(),
        backing_file_depth: depth,
        encrypted: info.as_ref().is_some_and(|i| i.encrypted),
        detect_zeroes: "off",
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image: ImageInfo {
            filename: image.name().into(),
            format: image.driver().name.into(),
            virtual_size: image.size(),
            cluster_size: info.as_ref().and_then(|i| i.cluster_size),
            backing_filename: backing,
            dirty_flag: info.as_ref().is_some_and(|i| i.dirty),
        },
        cache: CacheInfo { writeback: true, direct: false, no_flush: false },
        write_threshold: 0,
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Flat {
    #[serde(rename = "flat")]
    _flat: Option<bool>,
}

fn query_nodes(c: &Context, _: Flat) -> Result<Vec<NodeInfo>> {
    let nodes = c.machine(|m| m.block_nodes())?;
    Ok(nodes.iter().map(node_info).collect())
}

/// A drive with what is in it.
#[derive(Serialize, JsonSchema)]
struct BlockInfo {
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    qdev: Option<String>,
    #[serde(rename = "type")]
    kind: &'static str,
    removable: bool,
    locked: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    inserted: Option<NodeInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tray_open: Option<bool>,
    #[serde(rename = "io-status", skip_serializing_if = "Option::is_none")]
    io_status: Option<&'static str>,
}

/// The path of a device that uses a disk.
fn qdev(device: &Bag) -> Option<String> {
    let id = device.id.as_ref()?;
    let backend = if device.driver.starts_with("virtio-blk") { "/virtio-backend" } else { "" };
    Some(format!("/machine/peripheral/{id}{backend}"))
}

fn query_block(c: &Context, _: Empty) -> Result<Vec<BlockInfo>> {
    c.machine(|m| {
        let mut all = Vec::new();
        let nodes = m.block_nodes();
        let drives = m.drives();
        for device in m.devices() {
            let node_name = device.props.get("drive").and_then(Value::as_str);
            let node = nodes.iter().find(|n| Some(n.name.as_str()) == node_name);
            let removable = drives.iter().find(|d| {
                d.is_removable()
                    && (Some(d.name()) == device.id.as_deref()
                        || !d.spec().drive.is_empty() && Some(d.spec().drive.as_str()) == node_name)
            });
            if node.is_none() && removable.is_none() {
                continue;
            }
            let inserted = match removable {
                Some(drive) => drive.medium().map(|image| {
                    let name = nodes.iter().find(|n| std::sync::Arc::ptr_eq(&n.image, &image));
                    let name = name.map(|n| n.name.clone()).unwrap_or_default();
                    node_info(&BlockNode { name, image, device: None })
                }),
                None => node.map(node_info),
            };
            all.push(BlockInfo {
                device: String::new(),
                qdev: qdev(&device),
                kind: "unknown",
                removable: removable.is_some(),
                locked: removable.is_some_and(|d| d.tray_locked()),
                inserted,
                tray_open: removable.map(|d| d.tray_open()),
                io_status: Some("ok"),
            });
        }
        all
    })
}

fn query_block_jobs(_: &Context, _: Empty) -> Result<Vec<Value>> {
    Ok(Vec::new())
}

fn query_jobs(_: &Context, _: Empty) -> Result<Vec<Value>> {
    Ok(Vec::new())
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Add {
    /// The format or protocol.
    driver: String,
    /// Name of the node.
    node_name: String,
    /// The driver's own options.
    #[serde(flatten)]
    options: Map<String, Value>,
}

fn add(c: &Context, a: Add) -> Result<Empty> {
    base::props::check_id(&a.node_name)?;
    let mut bag = Bag::new(a.driver);
    bag.props = a.options;
    bag.props.insert("node-name".into(), a.node_name.clone().into());
    let mut graph = crate::context::lock(&c.block_graph);
    if graph.contains(&a.node_name) {
        return Err(Error::generic(format!("Duplicate nodes with node-name='{}'", a.node_name)));
    }
    graph.add(&bag).map_err(Error::generic)?;
    // Storage is opened with the format above it; alone it is an image only when a device takes it.
    if !machine::graph::is_storage(&bag.driver) {
        let image = graph.image(&a.node_name, &bag).map_err(|e| {
            graph.remove(&a.node_name);
            Error::generic(e)
        })?;
        if let Err(e) = c.machine(move |m| m.add_block_node(&image))? {
            graph.remove(&a.node_name);
            return Err(e.into());
        }
    }
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Del {
    node_name: String,
}

fn del(c: &Context, a: Del) -> Result<Empty> {
    let mut graph = crate::context::lock(&c.block_graph);
    if let Some(user) = graph.user_of(&a.node_name) {
        return Err(Error::generic(format!(
            "Node '{}' is busy: node is used as 'file' of '{user}'",
            a.node_name
        )));
    }
    let storage = graph.remove(&a.node_name);
    if storage == Some(true) {
        return Ok(Empty {});
    }
    let name = a.node_name.clone();
    c.machine(move |m| m.remove_block_node(&name))??;
    Ok(Empty {})
}

/// Which drive.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Which {
    device: Option<String>,
    id: Option<String>,
    force: Option<bool>,
}

fn which(device: Option<String>, id: Option<String>) -> Result<String> {
    let name = id.or(device).ok_or_else(|| Error::generic("Parameter 'id' is missing"))?;
    // A path of the object tree names the device, too.
    Ok(name.rsplit('/').next().unwrap_or_default().to_owned())
}

fn tray_moved(c: &Context, id: &str, open: bool) {
    c.emit("DEVICE_TRAY_MOVED", &serde_json::json!({ "device": "", "id": id, "tray-open": open }));
}

fn tray(c: &Context, a: Which, open: bool) -> Result<Empty> {
    let id = which(a.device, a.id)?;
    let name = id.clone();
    let force = a.force.unwrap_or(false);
    let moved = c.machine(move |m| {
        let drive = m.drive(&name)?;
        if open && drive.tray_locked() && !force {
            return Err(machine::Error::Config(format!(
                "Device '{name}' is locked and force was not specified"
            )));
        }
        Ok(drive.move_tray(open))
    })??;
    if moved {
        tray_moved(c, &id, open);
    }
    Ok(Empty {})
}

fn open_tray(c: &Context, a: Which) -> Result<Empty> {
    tray(c, a, true)
}

fn close_tray(c: &Context, a: Which) -> Result<Empty> {
    tray(c, a, false)
}

fn take_out(c: &Context, id: &str, force: bool) -> Result<Empty> {
    let name = id.to_owned();
    c.machine(move |m| {
        let drive = m.drive(&name)?;
        m.remove_medium(&drive, force)
    })??;
    Ok(Empty {})
}

fn remove_medium(c: &Context, a: Which) -> Result<Empty> {
    take_out(c, &which(a.device, a.id)?, true)
}

fn eject(c: &Context, a: Which) -> Result<Empty> {
    let id = which(a.device, a.id)?;
    take_out(c, &id, a.force.unwrap_or(false))?;
    tray_moved(c, &id, true);
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Insert {
    device: Option<String>,
    id: Option<String>,
    node_name: String,
}

fn insert_medium(c: &Context, a: Insert) -> Result<Empty> {
    let id = which(a.device, a.id)?;
    c.machine(move |m| m.insert_medium(&id, &a.node_name))??;
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Change {
    device: Option<String>,
    id: Option<String>,
    filename: String,
    format: Option<String>,
    force: Option<bool>,
}

fn change_medium(c: &Context, a: Change) -> Result<Empty> {
    let id = which(a.device, a.id)?;
    let name = id.clone();
    let force = a.force.unwrap_or(false);
    c.machine(move |m| {
        let drive = m.drive(&name)?;
        let node = format!("medium-{name}");
        let mut bag = Bag::new("blockdev").with("file", a.filename).with("read-only", drive.is_read_only());
        if let Some(format) = a.format {
            bag = bag.with("format", format);
        }
        bag.id = Some(node.clone());
        m.remove_medium(&drive, force)?;
        // An image of an earlier change.
        let _ = m.remove_block_node(&node);
        m.add_block_node(&bag)?;
        m.insert_medium(&name, &node)
    })??;
    tray_moved(c, &id, true);
    tray_moved(c, &id, false);
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Resize {
    device: Option<String>,
    node_name: Option<String>,
    size: u64,
}

fn resize(c: &Context, a: Resize) -> Result<Empty> {
    let name = a.node_name.or(a.device).ok_or_else(|| Error::generic("Parameter 'node-name' is missing"))?;
    c.machine(move |m| {
        let nodes = m.block_nodes();
        let node = nodes.iter().find(|n| n.name == name);
        let node =
            node.ok_or_else(|| Error::generic(format!("Cannot find device='' nor node-name='{name}'")))?;
        node.image
            .resize(a.size, block::formats::Preallocation::Off)
            .map_err(|e| Error::generic(e.to_string()))?;
        for drive in m.drives() {
            if drive.medium().is_some_and(|i| std::sync::Arc::ptr_eq(&i, &node.image)) {
                drive.resized();
            }
        }
        Ok(Empty {})
    })?
}
