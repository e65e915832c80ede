/// One result of `doctor`.
struct Finding {
  enum Level: String {
    case ok
    case warning
    case problem
  }

  var level: Level
  /// What was checked, such as "locked memory".
  var subject: String
  /// What was found.
  var detail: String
  /// What to do about it; "" if nothing.
  var advice: String

  static func ok(_ subject: String, _ detail: String, advice: String = "") -> Finding {
    Finding(level: .ok, subject: subject, detail: detail, advice: advice)
  }

  static func warning(_ subject: String, _ detail: String, advice: String) -> Finding {
    Finding(level: .warning, subject: subject, detail: detail, advice: advice)
  }

  static func problem(_ subject: String, _ detail: String, advice: String) -> Finding {
    Finding(level: .problem, subject: subject, detail: detail, advice: advice)
  }
}

/// A group of related findings.
struct FindingGroup {
  var title: String
  var findings: [Finding]

  /// Lines for people.
  var text: String {
    var lines = ["\(title)"]
    for finding in findings {
      let mark =
        switch finding.level {
        case .ok: "  ok       "
        case .warning: "  warning  "
        case .problem: "  PROBLEM  "
        }
      lines.append("\(mark)\(finding.subject): \(finding.detail)")
      if !finding.advice.isEmpty { lines.append("             -> \(finding.advice)") }
    }
    return lines.joined(separator: "\n")
  }

  var json: JSONObject {
    var json = JSONObject()
    json.add("group", title)
    json.add(
      "findings",
      findings.map { finding in
        var json = JSONObject()
        json.add("level", finding.level.rawValue)
        json.add("subject", finding.subject)
        json.add("detail", finding.detail)
        if !finding.advice.isEmpty { json.add("advice", finding.advice) }
        return json
      })
    return json
  }

  func count(_ level: Finding.Level) -> Int { findings.count { $0.level == level } }
}
