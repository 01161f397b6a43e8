package fields

import "slices"

// bootstrap is what internal/controllers/virtualmachine/bootstrap does.
func bootstrap() []Field {
	return slices.Concat(cloudInit(), linuxPrep(), sysprep(), vAppConfig())
}

func cloudInit() []Field {
	out := []Field{
		{Path: "spec.bootstrap.cloudInit.instanceID", Effect: Honoured, Note: "spec.biosUUID when empty; another one has cloud-init do again what it does once"},
		{Path: "spec.bootstrap.cloudInit.rawCloudConfig.name", Effect: Mapped, Note: "a Secret, or a ConfigMap; user-data of the NoCloud disk"},
		{Path: "spec.bootstrap.cloudInit.rawCloudConfig.key", Effect: Honoured, Note: "then user-data, then value; plain, base64 or gzip"},
		{Path: "spec.bootstrap.cloudInit.sshAuthorizedKeys", Effect: Mapped, Note: "public-keys in meta-data: keys of the guest's default user"},
		{Path: "spec.bootstrap.cloudInit.useGlobalNameserversAsDefault", Effect: Mapped, Note: "always true"},
		{Path: "spec.bootstrap.cloudInit.useGlobalSearchDomainsAsDefault", Effect: Mapped, Note: "always true"},
		{Path: "spec.bootstrap.cloudInit.waitOnNetwork4", Effect: Mapped, Note: "wait-on-network in meta-data; the address is fixed, so there is nothing to wait for"},
		{Path: "spec.bootstrap.cloudInit.waitOnNetwork6", Effect: Mapped, Note: "see waitOnNetwork4"},
		{Path: "spec.bootstrap.cloudInit.cloudConfig.defaultUserEnabled", Effect: Honoured, Note: "adds the default user to users; without users there is always one"},
		{Path: "spec.bootstrap.cloudInit.cloudConfig.runcmd", Effect: Honoured, Note: "a Jinja template, like all of cloudConfig"},
		{Path: "spec.bootstrap.cloudInit.cloudConfig.write_files[].content", Effect: Honoured, Note: "text, or name and key of a Secret"},
	}
	const config = "spec.bootstrap.cloudInit.cloudConfig."
	for _, name := range []string{
		"timezone", "ssh_pwauth", "write_files[].append", "write_files[].defer", "write_files[].encoding", "write_files[].owner",
		"write_files[].path", "write_files[].permissions", "users[].create_groups", "users[].expiredate", "users[].gecos",
		"users[].groups", "users[].hashed_passwd", "users[].homedir", "users[].inactive", "users[].lock_passwd", "users[].name",
		"users[].no_create_home", "users[].no_log_init", "users[].no_user_group", "users[].passwd", "users[].primary_group",
		"users[].selinux_user", "users[].shell", "users[].snapuser", "users[].ssh_authorized_keys", "users[].ssh_import_id",
		"users[].ssh_redirect_user", "users[].sudo", "users[].system", "users[].uid",
	} {
		out = append(out, Field{Path: config + name, Effect: Honoured})
	}
	return out
}

func linuxPrep() []Field {
	return []Field{
		{Path: "spec.bootstrap.linuxPrep.hardwareClockIsUTC", Effect: Mapped, Note: "/etc/adjtime, by cloud-init"},
		{Path: "spec.bootstrap.linuxPrep.timeZone", Effect: Mapped, Note: "by cloud-init"},
		{Path: "spec.bootstrap.linuxPrep.expirePasswordAfterNextLogin", Effect: Mapped, Note: "root's, by cloud-init"},
		{Path: "spec.bootstrap.linuxPrep.password", Effect: Mapped, Note: "root's, by cloud-init; the key is password when empty"},
		{Path: "spec.bootstrap.linuxPrep.scriptText", Effect: Mapped, Note: "run by cloud-init with precustomization before, and postcustomization after the rest"},
		{Path: "spec.bootstrap.linuxPrep.customizeAtNextPowerOn", Effect: Mapped, Note: "true customizes once more and becomes false; false does not customize, whatever has changed"},
	}
}

func sysprep() []Field {
	const inline = "spec.bootstrap.sysprep.sysprep."
	return []Field{
		{Path: "spec.bootstrap.sysprep.rawSysprep.name", Effect: Mapped, Note: "unattend.xml and autounattend.xml on a disk; may be a template"},
		{Path: "spec.bootstrap.sysprep.rawSysprep.key", Effect: Honoured, Note: "unattend when empty"},
		{Path: "spec.bootstrap.sysprep.customizeAtNextPowerOn", Effect: None, Note: "the disk is there at every power-on; Windows reads it when it is prepared for that"},
		{Path: inline + "guiRunOnce", Effect: Mapped, Note: "FirstLogonCommands"},
		{Path: inline + "guiUnattended.autoLogon", Effect: Mapped, Note: "AutoLogon of Administrator"},
		{Path: inline + "guiUnattended.autoLogonCount", Effect: Mapped, Note: "LogonCount"},
		{Path: inline + "guiUnattended.password", Effect: Mapped, Note: "AdministratorPassword"},
		{Path: inline + "guiUnattended.timeZone", Effect: Mapped, Note: "the name of the zone with that index; UTC when it is not set"},
		{Path: inline + "identification.domainAdmin", Effect: Mapped, Note: "UnattendedJoin; the domain is spec.network.domainName"},
		{Path: inline + "identification.domainAdminPassword", Effect: Mapped, Note: "UnattendedJoin"},
		{Path: inline + "identification.domainOU", Effect: Mapped, Note: "MachineObjectOU"},
		{Path: inline + "identification.joinWorkgroup", Effect: Mapped, Note: "UnattendedJoin"},
		{Path: inline + "licenseFilePrintData", Effect: None, Note: "it is for Windows Server 2003"},
		{Path: inline + "userData.fullName", Effect: Mapped, Note: "RegisteredOwner"},
		{Path: inline + "userData.orgName", Effect: Mapped, Note: "RegisteredOrganization"},
		{Path: inline + "userData.productID", Effect: Mapped, Note: "ProductKey"},
		{Path: inline + "expirePasswordAfterNextLogin", Effect: Mapped, Note: "Administrator's only"},
		{Path: inline + "scriptText", Effect: Mapped, Note: "a batch file of up to 50 KiB, run with precustomization and, at the first logon, postcustomization"},
	}
}

func vAppConfig() []Field {
	return []Field{
		{Path: "spec.bootstrap.vAppConfig.properties[].key", Effect: Mapped, Note: "ovf-env.xml on a disk, with the properties that the image declares"},
		{Path: "spec.bootstrap.vAppConfig.properties[].value", Effect: Mapped, Note: "a template with the functions of V1alpha1 to V1alpha5; loops are limited"},
		{Path: "spec.bootstrap.vAppConfig.rawProperties", Effect: Mapped, Note: "each key of the Secret is a property"},
	}
}
