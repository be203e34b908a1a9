-- SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
--
-- A Wireshark dissector for QEMU migrations with multifd: main streams, channels and the return path.
--
--   tshark -X lua_script:contrib/wireshark/multifd.lua -r capture.pcap
--   wireshark -X lua_script:contrib/wireshark/multifd.lua
--
-- To load it always, copy it to the folder "Personal Lua Plugins" (Help, About Wireshark, Folders). The format is described in
-- docs/develop/stream-format.md; a test compares the names below with its tables.
--
-- A connection is known by its first bytes, so a capture has to begin before the migration. The state of devices has no lengths in the
-- stream: it is shown as one piece. Connections with TLS cannot be read.

local proto = Proto("multifd", "QEMU migration")

local SECTIONS = {
  [0x00] = "EOF",
  [0x01] = "START",
  [0x02] = "PART",
  [0x03] = "END",
  [0x04] = "FULL",
  [0x05] = "SUBSECTION",
  [0x06] = "VMDESCRIPTION",
  [0x07] = "CONFIGURATION",
  [0x08] = "COMMAND",
  [0x7e] = "footer",
}

local COMMANDS = {
  [1] = "OPEN_RETURN_PATH",
  [2] = "PING",
  [3] = "POSTCOPY_ADVISE",
  [4] = "POSTCOPY_LISTEN",
  [5] = "POSTCOPY_RUN",
  [6] = "POSTCOPY_RAM_DISCARD",
  [7] = "PACKAGED",
  [8] = "ENABLE_COLO",
  [9] = "POSTCOPY_RESUME",
  [10] = "RECV_BITMAP",
  [11] = "SWITCHOVER_START",
}

local REPLIES = {
  [1] = "SHUT",
  [2] = "PONG",
  [3] = "REQ_PAGES_ID",
  [4] = "REQ_PAGES",
  [5] = "RECV_BITMAP",
  [6] = "RESUME_ACK",
  [7] = "SWITCHOVER_ACK",
  [0x6d66] = "REASON",
}

local RECORDS = {
  [0x001] = "FULL",
  [0x002] = "ZERO",
  [0x004] = "MEM_SIZE",
  [0x008] = "PAGE",
  [0x010] = "EOS",
  [0x040] = "XBZRLE",
  [0x080] = "HOOK",
  [0x100] = "COMPRESS_PAGE",
  [0x200] = "MULTIFD_FLUSH",
}

-- A modifier of records: they are about the block of the one before.
local CONTINUE = 0x020

local METHODS = {
  [0x00] = "none",
  [0x02] = "zlib",
  [0x04] = "zstd",
  [0x08] = "qpl",
  [0x10] = "uadk",
  [0x20] = "qatzip",
}

local f = {
  machine = ProtoField.string("multifd.machine", "Machine type"),
  section = ProtoField.uint8("multifd.section", "Section", base.HEX, SECTIONS),
  id = ProtoField.uint32("multifd.section.id", "Section number"),
  name = ProtoField.string("multifd.section.name", "Name"),
  instance = ProtoField.uint32("multifd.section.instance", "Instance"),
  version = ProtoField.uint32("multifd.section.version", "Version"),
  description = ProtoField.string("multifd.description", "Description of the devices"),
  devices = ProtoField.bytes("multifd.devices", "State of devices"),
  command = ProtoField.uint16("multifd.command", "Command", base.DEC, COMMANDS),
  value = ProtoField.uint32("multifd.value", "Value", base.HEX),
  record = ProtoField.uint16("multifd.record", "Record", base.HEX, RECORDS),
  block = ProtoField.string("multifd.block", "Block"),
  length = ProtoField.uint64("multifd.block.length", "Length of the block"),
  offset = ProtoField.uint64("multifd.offset", "Offset in the block", base.HEX),
  page = ProtoField.bytes("multifd.page", "Page"),
  reply = ProtoField.uint16("multifd.reply", "Reply", base.DEC, REPLIES),
  reason = ProtoField.string("multifd.reason", "Reason"),
  channel = ProtoField.uint8("multifd.channel", "Channel"),
  sync = ProtoField.bool("multifd.packet.sync", "SYNC"),
  method = ProtoField.uint8("multifd.packet.method", "Method", base.HEX, METHODS),
  normal = ProtoField.uint32("multifd.packet.normal", "Pages with contents"),
  zero = ProtoField.uint32("multifd.packet.zero", "Zero pages"),
  size = ProtoField.uint32("multifd.packet.size", "Bytes that follow"),
  number = ProtoField.uint64("multifd.packet.number", "Packet number"),
  data = ProtoField.bytes("multifd.data", "Data"),
}
local fields = {}
for _, field in pairs(f) do
  fields[#fields + 1] = field
end
proto.fields = fields

local malformed = ProtoExpert.new("multifd.malformed", "Not a migration stream", expert.group.MALFORMED, expert.severity.ERROR)
proto.experts = { malformed }

local has_bit = function(value, bit)
  return math.floor(value / bit) % 2 == 1
end

-- Each step gets the bytes from its beginning on, and returns how many it has used, or nil if it needs more. It draws only if it has all.

local MAX = 64 * 1024 * 1024

local function counted(tvb, at)
  if tvb:len() < at + 1 then return nil end
  local length = tvb(at, 1):uint()
  if tvb:len() < at + 1 + length then return nil end
  return tvb(at + 1, length), at + 1 + length
end

local function head(state, tvb, tree, info)
  if tvb:len() < 8 then return nil end
  tree:add(tvb(0, 8), "Header, version " .. tvb(4, 4):uint())
  info("header")
  state.phase = "section"
  return 8
end

local function subsection(state, tvb, tree, info)
  local name, at = counted(tvb, 1)
  if not name or tvb:len() < at + 4 then return nil end
  local body, text = at + 4, name:string()
  local used
  if text == "configuration/uuid" then
    used = body + 16
  elseif text == "configuration/target-page-bits" then
    used = body + 4
    if tvb:len() < used then return nil end
    state.shared.page = 2 ^ tvb(body, 4):uint()
  elseif text == "configuration/capabilities" then
    if tvb:len() < body + 4 then return nil end
    used = body + 4
    for _ = 1, tvb(body, 4):uint() do
      local capability
      capability, used = counted(tvb, used)
      if not capability then return nil end
      if capability:string() == "x-ignore-shared" then state.ignores_shared = true end
    end
  else
    return false
  end
  if tvb:len() < used then return nil end
  tree:add(f.section, tvb(0, 1))
  tree:add(f.name, name)
  info("SUBSECTION " .. text)
  return used
end

local function command(state, tvb, tree, info)
  if tvb:len() < 5 then return nil end
  local number, length = tvb(1, 2):uint(), tvb(3, 2):uint()
  if tvb:len() < 5 + length then return nil end
  local name = COMMANDS[number]
  if not name then return false end
  local used = 5 + length
  tree:add(f.section, tvb(0, 1))
  tree:add(f.command, tvb(1, 2))
  if name == "PING" and length == 4 then
    tree:add(f.value, tvb(5, 4))
    name = string.format("PING 0x%x", tvb(5, 4):uint())
  elseif name == "PACKAGED" and length == 4 then
    state.package = tvb(5, 4):uint()
    if state.package > MAX then return false end
    if state.package > 0 then state.phase = "package" end
    name = "PACKAGED, " .. state.package .. " bytes"
  elseif name == "POSTCOPY_ADVISE" then
    state.is_advised = true
  elseif length > 0 then
    tree:add(f.data, tvb(5, length))
  end
  info(name)
  return used
end

local function section(state, tvb, tree, info)
  if tvb:len() < 1 then return nil end
  local kind = tvb(0, 1):uint()
  local name = SECTIONS[kind]
  if name == "EOF" then
    tree:add(f.section, tvb(0, 1))
    info(name)
    return 1
  elseif name == "START" or name == "FULL" then
    if tvb:len() < 6 then return nil end
    local text, at = counted(tvb, 5)
    if not text or tvb:len() < at + 8 then return nil end
    tree:add(f.section, tvb(0, 1))
    tree:add(f.id, tvb(1, 4))
    tree:add(f.name, text)
    tree:add(f.instance, tvb(at, 4))
    tree:add(f.version, tvb(at + 4, 4))
    info(name .. " " .. text:string())
    if text:string() == "ram" then
      state.ram = tvb(1, 4):uint()
      state.phase = "ram"
    else
      state.phase = "devices"
    end
    return at + 8
  elseif name == "PART" or name == "END" then
    if tvb:len() < 5 then return nil end
    tree:add(f.section, tvb(0, 1))
    tree:add(f.id, tvb(1, 4))
    info(name)
    -- A source that returns sends no START.
    state.phase = (state.ram or tvb(1, 4):uint()) == tvb(1, 4):uint() and "ram" or "devices"
    return 5
  elseif name == "SUBSECTION" then
    return subsection(state, tvb, tree, info)
  elseif name == "VMDESCRIPTION" then
    if tvb:len() < 5 then return nil end
    local length = tvb(1, 4):uint()
    if length > MAX then return false end
    if tvb:len() < 5 + length then return nil end
    tree:add(f.section, tvb(0, 1))
    tree:add(f.description, tvb(5, length))
    info(name)
    return 5 + length
  elseif name == "CONFIGURATION" then
    if tvb:len() < 5 then return nil end
    local length = tvb(1, 4):uint()
    if length > 1024 then return false end
    if tvb:len() < 5 + length then return nil end
    tree:add(f.section, tvb(0, 1))
    tree:add(f.machine, tvb(5, length))
    info("machine " .. tvb(5, length):string())
    return 5 + length
  elseif name == "COMMAND" then
    return command(state, tvb, tree, info)
  elseif name == "footer" then
    if tvb:len() < 5 then return nil end
    tree:add(f.section, tvb(0, 1))
    tree:add(f.id, tvb(1, 4))
    return 5
  end
  return false
end

local function ram(state, tvb, tree, info)
  if tvb:len() < 8 then return nil end
  local page = state.shared.page
  local flags = tvb(4, 4):uint() % page
  local continues = has_bit(flags, CONTINUE)
  local flag = continues and flags - CONTINUE or flags
  local name = RECORDS[flag]
  local used, text = 8, nil
  local has_name = name == "ZERO" or name == "PAGE" or name == "XBZRLE"
  if has_name and not continues then
    text, used = counted(tvb, 8)
    if not text then return nil end
  end
  local body = used
  if name == "ZERO" then
    used = used + 1
  elseif name == "PAGE" then
    used = used + page
  elseif name == "XBZRLE" then
    if tvb:len() < used + 3 then return nil end
    used = used + 3 + tvb(used + 1, 2):uint()
  elseif name == "EOS" then
    state.phase = "section"
  elseif name == "MEM_SIZE" then
    local total = tvb(0, 8):uint64()
    state.left, state.phase = total - flags, "blocks"
  elseif name ~= "MULTIFD_FLUSH" then
    return false
  end
  if tvb:len() < used then return nil end
  tree:add(f.record, tvb(6, 2), flag)
  if has_name then
    tree:add(f.offset, tvb(0, 8), tvb(0, 8):uint64() - flags)
    if text then tree:add(f.block, text) end
  end
  if name == "PAGE" then tree:add(f.page, tvb(body, page)) end
  info(name)
  return used
end

local function blocks(state, tvb, tree, info)
  local name, at = counted(tvb, 0)
  if not name or tvb:len() < at + 8 then return nil end
  local length, used = tvb(at, 8):uint64(), at + 8
  if state.ignores_shared then used = used + 8 end
  local left = state.left - length
  if state.is_advised then
    -- A size of host pages begins with 0, a name does not.
    if tvb:len() < used + 8 then return nil end
    if tvb(used, 1):uint() == 0 and tvb(used, 8):uint64() >= UInt64(state.shared.page) then used = used + 8 end
  end
  if tvb:len() < used then return nil end
  state.left = left
  if left == UInt64(0) then state.phase = "ram" end
  tree:add(f.block, name)
  tree:add(f.length, tvb(at, 8))
  info("block " .. name:string())
  return used
end

local function package(state, tvb, tree, info)
  if tvb:len() < state.package then return nil end
  tree:add(f.data, tvb(0, state.package))
  info("package")
  state.phase = "section"
  return state.package
end

local function devices(_, tvb, tree, info)
  if tvb:len() < 1 then return nil end
  tree:add(f.devices, tvb())
  info("devices")
  return tvb:len()
end

local function reply(state, tvb, tree, info)
  if tvb:len() < 4 then return nil end
  local kind, length = tvb(0, 2):uint(), tvb(2, 2):uint()
  local name = REPLIES[kind]
  if not name then return false end
  local used = 4 + length
  if tvb:len() < used then return nil end
  if name == "RECV_BITMAP" then
    if tvb:len() < used + 8 then return nil end
    local size = tvb(used, 8):uint64():tonumber()
    if size > MAX then return false end
    used = used + 8 + size + 8
    if tvb:len() < used then return nil end
  end
  tree:add(f.reply, tvb(0, 2))
  local text = name
  if (name == "SHUT" or name == "PONG" or name == "RESUME_ACK") and length == 4 then
    tree:add(f.value, tvb(4, 4))
    text = string.format("%s 0x%x", name, tvb(4, 4):uint())
  elseif name == "REASON" then
    tree:add(f.reason, tvb(4, length))
  elseif length > 0 then
    tree:add(f.data, tvb(4, length))
  end
  info(text)
  return used
end

local function initial(state, tvb, tree, info)
  if tvb:len() < 64 then return nil end
  tree:add(f.channel, tvb(24, 1))
  state.shared.channel = tvb(24, 1):uint()
  info("channel " .. state.shared.channel)
  state.phase = "packet"
  return 64
end

local function packet(state, tvb, tree, info)
  if tvb:len() < 24 then return nil end
  if tvb(0, 4):uint() ~= 0x11223344 or tvb(4, 4):uint() ~= 1 then return false end
  local flags = tvb(8, 4):uint()
  if has_bit(flags, 0x40) then
    if tvb:len() < 276 then return nil end
    local size = tvb(272, 4):uint()
    if size > MAX then return false end
    if tvb:len() < 276 + size then return nil end
    tree:add(f.name, tvb(12, 256))
    tree:add(f.instance, tvb(268, 4))
    tree:add(f.devices, tvb(276, size))
    info("device state")
    return 276 + size
  end
  local alloc, normal, size = tvb(12, 4):uint(), tvb(16, 4):uint(), tvb(20, 4):uint()
  -- A SYNC of newer sources does not have it.
  if alloc > 0 then state.alloc = alloc end
  local count = state.alloc or 524288 / state.shared.page
  local full = 320 + 8 * count
  if normal == 0 then size = 0 end
  if count > 8192 or normal > count or size > MAX then return false end
  if tvb:len() < full + size then return nil end
  local zero, is_sync = tvb(32, 4):uint(), has_bit(flags, 1)
  tree:add(f.channel, state.shared.channel or 0):set_generated()
  tree:add(f.sync, tvb(8, 4), is_sync)
  if normal > 0 then tree:add(f.method, tvb(11, 1), tvb(11, 1):uint() - (is_sync and 1 or 0)) end
  tree:add(f.normal, tvb(16, 4))
  tree:add(f.zero, tvb(32, 4))
  tree:add(f.size, tvb(20, 4))
  tree:add(f.number, tvb(24, 8))
  if normal + zero > 0 then tree:add(f.block, tvb(64, 256)) end
  for page = 0, math.min(normal + zero, count) - 1 do
    tree:add(f.offset, tvb(320 + 8 * page, 8))
  end
  if size > 0 then tree:add(f.data, tvb(full, size)) end
  local text = {}
  if is_sync then text[#text + 1] = "SYNC" end
  if normal > 0 then text[#text + 1] = normal .. " pages" end
  if zero > 0 then text[#text + 1] = zero .. " zero pages" end
  info(#text > 0 and table.concat(text, ", ") or "empty packet")
  return full + size
end

local STEPS = {
  head = head,
  section = section,
  ram = ram,
  blocks = blocks,
  package = package,
  devices = devices,
  reply = reply,
  initial = initial,
  packet = packet,
}

-- For each TCP stream: who the source is, and the state of both directions.
local streams = {}
-- The state before each step, because Wireshark dissects frames again, in any order.
local before = {}
local number_of_stream = Field.new("tcp.stream")

function proto.init()
  streams, before = {}, {}
end

local function copy(state)
  local other = {}
  for key, value in pairs(state) do
    other[key] = value
  end
  return other
end

-- What a connection is, by its first bytes.
local function kind_of(tvb)
  if tvb:len() < 8 then return nil end
  local magic = tvb(0, 4):uint()
  if magic == 0x5145564d then return "head" end
  if magic == 0x11223344 and tvb(4, 4):uint() == 1 then return "initial" end
  -- A source that returns after the switch to post-copy.
  if tvb(0, 3):uint() == 0x080001 or tvb(0, 3):uint() == 0x08000a then return "section" end
  return nil
end

function proto.dissector(tvb, pinfo, tree)
  local stream = streams[number_of_stream().value]
  if not stream then return 0 end
  local is_source = pinfo.src_port == stream.port and tostring(pinfo.src) == stream.host
  local side = is_source and "source" or "destination"
  pinfo.cols.protocol = "multifd"
  local root, texts, at = nil, {}, 0
  while at < tvb:len() do
    local key = table.concat({ pinfo.number, number_of_stream().value, at, tvb:len() }, ":")
    local state = copy(before[key] or stream[side])
    if not before[key] then before[key] = copy(state) end
    root = root or tree:add(proto, tvb(at))
    local item, what = root:add(tvb(at), "footer"), nil
    local used = STEPS[state.phase](state, tvb(at):tvb(), item, function(text)
      what = text
      if texts[#texts] ~= text then texts[#texts + 1] = text end
    end)
    if used then item:set_len(used) end
    if what then item:set_text(what) end
    if not used then item:set_text("a part of what follows") end
    if used == false then
      root:add_proto_expert_info(malformed)
      break
    elseif used == nil then
      pinfo.desegment_offset = at
      pinfo.desegment_len = DESEGMENT_ONE_MORE_SEGMENT
      break
    end
    stream[side] = state
    at = at + used
  end
  if #texts > 8 then texts = { texts[1], texts[2], "… " .. #texts - 4 .. " more …", texts[#texts - 1], texts[#texts] } end
  pinfo.cols.info:set((is_source and "" or "reply: ") .. table.concat(texts, " | "))
  return tvb:len()
end

proto:register_heuristic("tcp", function(tvb, pinfo, tree)
  local stream = number_of_stream()
  local kind = kind_of(tvb)
  if not stream or not (kind or streams[stream.value]) then return false end
  if not streams[stream.value] then
    local shared = { page = 4096 }
    streams[stream.value] = {
      host = tostring(pinfo.src),
      port = pinfo.src_port,
      source = { phase = kind, shared = shared },
      destination = { phase = "reply", shared = shared },
    }
  end
  pinfo.conversation = proto
  proto.dissector(tvb, pinfo, tree)
  return true
end)
